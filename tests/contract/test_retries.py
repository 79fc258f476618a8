"""What the official client repeats by itself, and that it then succeeds.

It obeys `x-should-retry` and `Retry-After` before any rule of its own, so these tests are about
what the proxy and the engines tell it. `retries_taken` is its own count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import AsyncOpenAI, InternalServerError, OpenAI, RateLimitError

from tests.contract.conftest import KEY, Site
from tests.fakes.engines import Engines, message
from tests.fakes.programs import Endpoint, free_port, proxy_before, simulator_at, until

HELLO = [message("Say hello.")]
RETRIES_MAX = 4


def ask(client: OpenAI, model: str) -> int:
    """Ask for a token; return how often the client had to repeat."""
    raw = client.with_options(max_retries=RETRIES_MAX).chat.completions.with_raw_response.create(
        model=model, messages=HELLO, max_tokens=1
    )
    assert raw.parse().choices[0].finish_reason == "length"
    return raw.retries_taken


async def ask_patiently(aclient: AsyncOpenAI, model: str) -> int:
    """The same, for as long as it takes."""
    patient = aclient.with_options(max_retries=30)
    raw = await patient.chat.completions.with_raw_response.create(
        model=model, messages=HELLO, max_tokens=1
    )
    assert raw.parse().choices[0].finish_reason == "length"
    return raw.retries_taken


async def until_refused(proxy: Endpoint, code: str, count: int) -> None:
    """Wait until the proxy has answered `count` requests with this status."""
    await asyncio.to_thread(
        until, lambda: proxy.metric("doherty_requests_total", code=code) >= count, f"a {code}"
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_engines_refusal_is_repeated(client: OpenAI, engines: Engines, status: int) -> None:
    with engines.faulty(f"status:{status}:times=1"):
        # Each of two replicas refuses one request, and one that has is left alone for a moment.
        assert 1 <= ask(client, engines.model) <= 2


def test_a_replica_lost_before_its_answer_is_told_and_repeated_by_the_client(
    client: OpenAI, engines: Engines
) -> None:
    before = engines.counts()["requests"]
    with engines.faulty("refuse:times=1"):
        assert 1 <= ask(client, engines.model) <= 2
    # The requests that were refused reached no engine's queue: the proxy repeated none of them.
    assert engines.until_idle()["requests"] == before + 1


def test_a_lost_replica_is_a_502_of_ours(client: OpenAI, engines: Engines) -> None:
    with engines.faulty("refuse"), pytest.raises(InternalServerError) as caught:
        client.chat.completions.create(model=engines.model, messages=HELLO)
    error = caught.value
    assert error.status_code == 502
    assert error.code == "replica_lost"
    assert error.response.headers["x-should-retry"] == "true"
    assert any(url.removeprefix("http://") in error.message for url in engines.urls)


def test_garbage_for_an_answer_is_a_502_of_ours(client: OpenAI, engines: Engines) -> None:
    with engines.faulty("garbage"), pytest.raises(InternalServerError) as caught:
        client.chat.completions.create(model=engines.model, messages=HELLO)
    assert caught.value.status_code == 502
    # Octets that never become a head are told by what ends them: a close, or too many of them.
    assert caught.value.code in ("bad_replica_answer", "replica_lost")


@pytest.fixture
def narrow(site: Site, folder: Path) -> Iterator[Endpoint]:
    """A proxy that takes two requests at a time and waits a second for an engine."""
    flags = ("--max-concurrent-requests=2", "--request-timeout-secs=1")
    urls = site.engines["vllm"].urls
    with proxy_before(folder / "narrow.log", *flags, "--worker-urls", *urls) as proxy:
        until(lambda: proxy.metric("doherty_replica_state", state="ready") == len(urls), "replicas")
        yield proxy


async def test_too_many_requests_wait_for_room(site: Site, narrow: Endpoint) -> None:
    model = site.engines["vllm"].model
    async with AsyncOpenAI(base_url=narrow.base_url, api_key=KEY, max_retries=0) as aclient:
        held = [
            await aclient.chat.completions.create(
                model=model, messages=HELLO, stream=True, max_tokens=100_000
            )
            for _ in range(2)
        ]
        with pytest.raises(RateLimitError) as caught:
            await aclient.chat.completions.create(model=model, messages=HELLO)
        assert caught.value.code == "too_many_requests"
        assert caught.value.type == "rate_limit_error"
        assert caught.value.response.headers["retry-after"] == "1"
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(ask_patiently(aclient, model))
            await until_refused(narrow, "429", 2)
            assert not waiting.done()
            for stream in held:
                await stream.close()
        assert waiting.result() >= 1


def test_a_silent_replica_is_a_504(site: Site, narrow: Endpoint) -> None:
    engines = site.engines["vllm"]
    before = engines.counts()["aborted"]
    with (
        OpenAI(base_url=narrow.base_url, api_key=KEY, max_retries=0) as client,
        engines.paused(),
    ):
        with pytest.raises(InternalServerError) as caught:
            client.chat.completions.create(model=engines.model, messages=HELLO)
        assert caught.value.status_code == 504
        assert caught.value.code == "replica_timeout"
        assert "--request-timeout-secs" in caught.value.message
        engines.until(lambda c: c["aborted"] == before + 1 and not c["waiting"], "an abort")


async def test_a_fleet_that_comes_up_late_is_waited_for(folder: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with proxy_before(folder / "late-proxy.log", "--worker-urls", url) as proxy:
        async with AsyncOpenAI(base_url=proxy.base_url, api_key=KEY, max_retries=0) as aclient:
            with pytest.raises(InternalServerError) as caught:
                await aclient.chat.completions.create(model="late", messages=HELLO)
            assert caught.value.status_code == 503
            assert caught.value.code == "no_replica"
            assert "1 starting" in caught.value.message
            assert caught.value.response.headers["retry-after"] == "1"
            with ExitStack() as stack:
                async with asyncio.TaskGroup() as group:
                    waiting = group.create_task(ask_patiently(aclient, "late"))
                    await until_refused(proxy, "503", 2)
                    engine = simulator_at(folder / "late-engine.log", model="late", port=port)
                    stack.enter_context(engine)
                assert waiting.result() >= 1
