"""/v1/messages as Anthropic's clients send it: the key in `x-api-key`, named events back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import KEY, Site
from tests.fakes.engines import Engines, message
from tests.fakes.programs import Endpoint, Fetched, fetch, proxy_before, simulator_at, until

VERSION = {"anthropic-version": "2023-06-01", "content-type": "application/json"}


def send(proxy: Endpoint, key: str | None, path: str = "/messages", **fields: Any) -> Fetched:
    headers = VERSION | ({"x-api-key": key} if key else {})
    body = {"messages": [message("Say hello.")], "max_tokens": 5, **fields}
    return fetch(proxy.base_url + path, json.dumps(body).encode(), headers)


def events(answer: Fetched) -> list[tuple[str, Any]]:
    """Return name and value of each event; every one must have both."""
    found = []
    for block in answer.text.split("\n\n"):
        if block:
            name, value = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(value.removeprefix("data: "))))
    return found


def test_message(site: Site, engines: Engines) -> None:
    answer = send(site.proxy, KEY, model=engines.model, system="Be brief.")
    assert answer.status == 200
    assert answer.value["type"] == "message"
    assert answer.value["stop_reason"] == "max_tokens"
    assert answer.value["usage"]["output_tokens"] == 5
    assert answer.headers["x-request-id"]


def test_stream_has_the_same_words(site: Site, engines: Engines) -> None:
    whole = send(site.proxy, KEY, model=engines.model)
    answer = send(site.proxy, KEY, model=engines.model, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    names = [name for name, _ in found]
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(name == value["type"] for name, value in found)
    text = "".join(value["delta"]["text"] for _, value in found if "text" in value.get("delta", {}))
    assert text == whole.value["content"][0]["text"] != ""


def test_tokens_are_counted(site: Site, engines: Engines) -> None:
    answer = send(site.proxy, KEY, "/messages/count_tokens", model=engines.model)
    whole = send(site.proxy, KEY, model=engines.model)
    usage = whole.value["usage"]
    assert answer.value["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_cut_stream_ends_without_its_last_event(site: Site, engines: Engines) -> None:
    with engines.faulty("cut:200"), pytest.raises(IncompleteRead) as caught:
        send(site.proxy, KEY, model=engines.model, stream=True, max_tokens=400)
    assert b"content_block_delta" in caught.value.partial
    assert b"message_stop" not in caught.value.partial
    assert b"replica_lost" in caught.value.partial


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Endpoint]:
    """Engine and proxy that want the same key, as operators set them up."""
    log = folder / "keyed-engine.log"
    with (
        simulator_at(log, f"--api-key={KEY}", model="keyed") as url,
        proxy_before(folder / "keyed-proxy.log", f"--api-key={KEY}", "--worker-urls", url) as proxy,
    ):
        until(lambda: proxy.metric("doherty_replica_state", state="ready"), "a ready replica")
        yield proxy


def test_the_key_of_anthropics_clients_opens_proxy_and_engine(guarded: Endpoint) -> None:
    answer = send(guarded, KEY, model="keyed")
    assert answer.status == 200, answer.text


@pytest.mark.parametrize("key", [None, "sk-other"])
def test_another_key_does_not(guarded: Endpoint, key: str | None) -> None:
    answer = send(guarded, key, model="keyed")
    assert answer.status == 401
    assert answer.value["error"]["type"] == "authentication_error"
    assert answer.value["error"]["code"] == "invalid_api_key"
