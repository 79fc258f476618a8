"""Each failure as the exception that the official client makes of it, with its fields.

The proxy's own errors have OpenAI's shape on every engine, and so have the engines' once the proxy
has told them: vLLM's come with a number for a code, SGLang's flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.contract.conftest import CLIENT_TIMEOUT_S, KEY, Site
from tests.fakes.engines import Engines, message
from tests.fakes.programs import Endpoint, proxy_before, until

HELLO = [message("Say hello.")]
BODY_BYTES_MAX = 100_000


class Case(msgspec.Struct, frozen=True):
    """What is sent, what is raised, and the three fields that programs look at."""

    name: str
    send: Callable[[OpenAI, str], object]
    raised: type[openai.APIStatusError]
    status: int
    code: str
    param: str | None = None
    kind: str = "invalid_request_error"
    words: str = ""


def raw(client: OpenAI, content: bytes, path: str = "/chat/completions") -> object:
    """Post octets that are no request of the client's making."""
    return client.post(path, content=content, cast_to=object)


def chat(client: OpenAI, **fields: Any) -> object:
    return client.post("/chat/completions", body=fields, cast_to=object)


OURS = (
    Case(
        "invalid JSON",
        lambda client, _: raw(client, b'{"model": "demo-vllm", "messages": ['),
        openai.BadRequestError,
        400,
        "invalid_json",
        words="not valid JSON",
    ),
    Case(
        "empty body",
        lambda client, _: raw(client, b""),
        openai.BadRequestError,
        400,
        "invalid_json",
    ),
    Case(
        "not an object",
        lambda client, _: raw(client, b"[1, 2]"),
        openai.BadRequestError,
        400,
        "invalid_request",
        words="must be a JSON object",
    ),
    Case(
        "no model",
        lambda client, _: chat(client, messages=HELLO),
        openai.BadRequestError,
        400,
        "missing_model",
        param="model",
        words="names no model",
    ),
    Case(
        "model of a wrong type",
        lambda client, _: chat(client, model=7, messages=HELLO),
        openai.BadRequestError,
        400,
        "invalid_request",
        param="model",
    ),
    Case(
        "stream of a wrong type",
        lambda client, model: chat(client, model=model, messages=HELLO, stream="yes"),
        openai.BadRequestError,
        400,
        "invalid_request",
        param="stream",
    ),
    Case(
        "unknown model",
        lambda client, _: chat(client, model="gpt-nobody", messages=HELLO),
        openai.NotFoundError,
        404,
        "model_not_found",
        param="model",
        words="demo-vllm",
    ),
    Case(
        "unknown path",
        lambda client, model: client.images.generate(model=model, prompt="a bird"),
        openai.NotFoundError,
        404,
        "unknown_path",
        words="/v1/images/generations",
    ),
    Case(
        "wrong method",
        lambda client, _: client.get("/completions", cast_to=object),
        openai.APIStatusError,
        405,
        "method_not_allowed",
        words="use POST",
    ),
)


def judge(error: openai.APIStatusError, case: Case) -> None:
    assert type(error) is case.raised
    assert (error.status_code, error.code, error.param, error.type) == (
        case.status,
        case.code,
        case.param,
        case.kind,
    )
    assert case.words in error.message
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.request_id


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_our_errors(client: OpenAI, site: Site, case: Case) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        case.send(client, site.engines["vllm"].model)
    judge(caught.value, case)
    assert caught.value.response.headers.get("x-should-retry") != "true"


def test_the_connection_lives_on_after_an_error(site: Site) -> None:
    before = site.proxy.metric("doherty_connections_accepted_total")
    with OpenAI(base_url=site.proxy.base_url, api_key=KEY, max_retries=0) as client:
        for _ in range(3):
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="gpt-nobody", messages=HELLO)
        client.models.list()
    assert site.proxy.metric("doherty_connections_accepted_total") == before + 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": HELLO, "max_tokens": "many"}, "max_tokens"),
        ({"messages": HELLO, "temperature": -1}, "temperature"),
    ],
    ids=["messages as text", "no messages", "no role", "wrong type", "out of range"],
)
def test_an_engines_refusal_is_told_in_openais_words(
    client: OpenAI, engines: Engines, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model=engines.model, **fields)
    error = caught.value
    assert words in error.message
    assert error.code == "400"
    assert error.type == "invalid_request_error"
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.body["message"] in error.message
    assert error.request_id


# --- with a key, and with room for little ------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(site: Site, folder: Path) -> Iterator[Endpoint]:
    flags = (f"--api-key={KEY}", f"--max-payload-size={BODY_BYTES_MAX}")
    engines = site.engines["sglang"]
    with proxy_before(folder / "guarded.log", *flags, "--worker-urls", *engines.urls) as proxy:
        until(
            lambda: proxy.metric("doherty_replica_state", state="ready") == len(engines.urls),
            "two ready replicas",
        )
        yield proxy


def client_of(proxy: Endpoint, key: str) -> OpenAI:
    return OpenAI(base_url=proxy.base_url, api_key=key, max_retries=0, timeout=CLIENT_TIMEOUT_S)


def test_the_right_key_opens(guarded: Endpoint, site: Site) -> None:
    model = site.engines["sglang"].model
    with client_of(guarded, KEY) as client:
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
        assert answer.choices
        assert [served.id for served in client.models.list()] == [model]


@pytest.mark.parametrize("key", ["sk-other", KEY + "x", KEY[:-1], KEY.upper()])
def test_a_wrong_key_does_not(guarded: Endpoint, site: Site, key: str) -> None:
    model = site.engines["sglang"].model
    sends: tuple[Callable[[OpenAI], object], ...] = (
        lambda client: client.chat.completions.create(model=model, messages=HELLO),
        lambda client: client.models.list(),
    )
    for send in sends:
        with client_of(guarded, key) as client, pytest.raises(openai.AuthenticationError) as caught:
            send(client)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.type == "authentication_error"
        assert key not in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_too_large_a_body(guarded: Endpoint, site: Site, *, stream: bool) -> None:
    big = [message("x" * BODY_BYTES_MAX)]
    model = site.engines["sglang"].model
    with client_of(guarded, KEY) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model=model, messages=big, stream=stream)
        judge(
            caught.value,
            Case(
                "", lambda *_: None, openai.APIStatusError, 413, "request_too_large",
                words="--max-payload-size",
            ),
        )  # fmt: skip
        # The refusal did not break the client's pool.
        assert client.chat.completions.create(model=model, messages=HELLO, max_tokens=1).choices


async def test_typed_errors_of_the_async_client(guarded: Endpoint, site: Site) -> None:
    async with AsyncOpenAI(base_url=guarded.base_url, api_key="wrong", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError):
            await wrong.models.list()
    async with AsyncOpenAI(base_url=site.proxy.base_url, api_key=KEY, max_retries=0) as aclient:
        with pytest.raises(openai.NotFoundError):
            await aclient.chat.completions.create(model="gpt-nobody", messages=HELLO, stream=True)


def test_an_unknown_response_is_asked_of_every_replica_and_not_found(
    guarded: Endpoint, site: Site
) -> None:
    assert len(site.engines["sglang"].urls) == 2
    with client_of(guarded, KEY) as client, pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve("resp_of_nobody")
    assert caught.value.type == "not_found_error"
