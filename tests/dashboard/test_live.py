"""The page on the real thing: `doherty up` with simulators, and a proxy that wants a key."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.browser import Browser
from tests.fakes.programs import PROXY, fetch, running, simulator_at, until
from tests.fakes.whole import REPLICAS, Whole, whole

KEY = "let me in"


@pytest.fixture(scope="module")
def up(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tmp_path_factory.mktemp("up")) as started:
        yield started
        browser.driver.get("about:blank")  # it watches no longer, so that the proxy may end


def row(name: str) -> str:
    """Return the script that finds the row of a replica."""
    is_it = f"(row) => row.querySelector('.v-name').textContent === '{name}'"
    return f"[...document.querySelectorAll('#replicas tbody tr')].find({is_it})"


def chat(url: str, text: str) -> None:
    question = {"role": "user", "content": text}
    body = json.dumps({"model": "demo", "messages": [question], "max_tokens": 8}).encode()
    fields = {"content-type": "application/json"}
    assert fetch(url + "/v1/chat/completions", body, fields).status == 200


def replica(up: Whole, name: str) -> dict[str, Any]:
    """Return what the manager says of a replica."""
    replicas: list[dict[str, Any]] = up.fleet()["replicas"]
    return next(one for one in replicas if one["replica_id"] == name)


def test_a_whole_doherty_is_seen_at_work(browser: Browser, up: Whole) -> None:
    browser.open(up.admin_url + "/")
    browser.until("document.body.dataset.drawn")
    assert browser.text("#proxy-state .word") == "ready"
    browser.until(f"document.querySelectorAll('#replicas tbody tr').length === {REPLICAS}")
    assert browser.text("#ready-count") == f"{REPLICAS} of {REPLICAS} ready"
    for number in range(12):
        chat(up.url, "Of all that is shared. " * 200 + f"And of {number}.")
    browser.until("document.querySelector('#models tbody')?.textContent.includes('demo')")
    browser.until("document.querySelector('#codes tbody')?.textContent.includes('200')")
    browser.until("document.querySelectorAll('#reasons tbody tr').length > 0")
    browser.until("document.querySelectorAll('#ring .arc').length === arguments[0]", REPLICAS)
    time = "document.querySelector('#models [data-label^=\"First token\"] .q-p50').textContent"
    browser.until(f"/ (ms|s|µs)$/u.test({time})")
    browser.until(
        "document.querySelector('#scaling [data-part=pools]').textContent.includes('demo')"
    )
    assert browser.console() == []
    assert [url for url in browser.asked() if not url.startswith(up.admin_url)] == []


def test_a_drain_on_the_page_is_the_managers(browser: Browser, up: Whole) -> None:
    browser.open(up.admin_url + "/")
    name = up.fleet()["replicas"][0]["replica_id"]
    browser.until(f"{row(name)} !== undefined")
    browser.js(f"{row(name)}.querySelector('.drain').click()")
    assert browser.text("#drain-title") == f"Drain {name}?"
    browser.click("#drain-go")
    until(lambda: replica(up, name).get("state") == "draining", "the manager's state")
    browser.until(f"{row(name)}.querySelector('.v-word').textContent === 'draining'")
    browser.until(f"{row(name)}.querySelector('.drain').textContent === 'Undrain'")
    assert "drained by an operator" in browser.js(f"return {row(name)}.textContent")
    assert f"{name} is draining" in browser.text("#spoken")
    chat(up.url, "The others go on.")
    browser.js(f"{row(name)}.querySelector('.drain').click()")
    browser.click("#drain-go")
    until(lambda: replica(up, name).get("state", "ready") == "ready", "the manager's state")
    browser.until(f"{row(name)}.querySelector('.v-word').textContent === 'ready'")
    assert browser.console() == []


def test_a_replica_that_dies_is_seen_to_come_back(browser: Browser, up: Whole) -> None:
    browser.open(up.admin_url + "/")
    name, pid = sorted(up.replica_pids().items())[1]
    browser.until(f"{row(name)}?.querySelector('.v-word').textContent === 'ready'")
    os.kill(pid, signal.SIGKILL)
    browser.until(f"{row(name)}.querySelector('.v-restarts').textContent === '1'")
    browser.until(f"{row(name)}.querySelector('.v-word').textContent === 'ready'")
    assert f"{name} is ready" in browser.text("#spoken")


def test_a_request_is_explained_by_the_proxy(browser: Browser, up: Whole) -> None:
    browser.open(up.admin_url + "/")
    browser.until("document.querySelector('#explain [name=model]').value === 'demo'")
    browser.find("#explain [name=prompt]").send_keys("Where would this go, and why?")
    browser.click("#explain [data-part=submit]")
    browser.until("!document.querySelector('#explain [data-part=result]').hidden")
    said = browser.text("#explain [data-part=answer]")
    chosen = browser.text(".candidates tr[data-chosen] th .first")
    assert said.startswith(f"Goes to {chosen}: ")
    rows = browser.js("return document.querySelectorAll('.candidates tbody tr').length")
    assert rows == REPLICAS
    assert browser.js("return document.querySelectorAll('[data-part=chain] tr').length") > 0
    browser.js("document.querySelector('#explain [name=model]').value = 'nobody'")
    browser.click("#explain [data-part=submit]")
    browser.until("document.querySelector('#explain [data-part=answer]').dataset.tone === 'bad'")
    assert "nobody" in browser.text("#explain [data-part=answer]")
    refused = [line for line in browser.console() if "404" not in line]  # Chromium notes statuses
    assert refused == []


def test_a_proxy_with_a_key_asks_for_it_and_drains_by_itself(
    browser: Browser, tmp_path: Path
) -> None:
    with simulator_at(tmp_path / "engine.log", model="demo") as engine:
        flags = ("--worker-urls", engine, "--port=0", "--admin-port=0", "--admin-api-key", KEY)
        with running((*PROXY, *flags), tmp_path / "proxy.log") as proxy:
            admin = proxy.until_said(r"admin listener on (http://\S+)")[1]
            proxy.until_said(r"listening on https?://\S+, \d+ w")
            browser.open(admin + "/")
            browser.until("document.querySelector('#key-dialog').open")
            browser.find("#key-value").send_keys(KEY)
            browser.click("#key-form [type=submit]")
            browser.until("document.querySelectorAll('#replicas tbody tr').length === 1")
            assert "There is no manager" in browser.text("#scaling")
            browser.until(
                "document.querySelector('#replicas tbody .v-word').textContent === 'ready'"
            )
            browser.click("#replicas .drain")
            assert browser.text("#drain-others").startswith("No other replica is ready")
            browser.click("#drain-go")
            state = "document.querySelector('#replicas tbody .v-word').textContent"
            browser.until(f"{state} === 'draining'")
            fields = {"authorization": f"Bearer {KEY}"}
            held = fetch(admin + "/view", headers=fields).value["replicas"]
            assert [(one["state"], one["held"]) for one in held] == [("draining", True)]
            browser.click("#replicas .drain")
            browser.click("#drain-go")
            browser.until(f"{state} === 'ready'")
            browser.driver.get("about:blank")
