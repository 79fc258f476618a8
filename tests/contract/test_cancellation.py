"""A client that goes away stops the engine, in every state; an engine that goes away is told.

The engines' own counts are the witnesses: what was given up is `aborted`, and nothing of it runs
on, waits, or is still being answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, OpenAI

from tests.contract.conftest import Site
from tests.fakes.engines import Counts, Engines, message
from tests.fakes.programs import until

LONG = 200_000  # tokens; minutes of work, which nobody waits for
STORY = [message("Tell me a very long story.")]
SHORT_S = 0.5


def given_up(before: Counts, count: int) -> Callable[[Counts], bool]:
    """Claim that `count` requests were aborted since `before` and that nothing is left."""

    def claim(now: Counts) -> bool:
        left = now["running"] + now["waiting"] + now["in_flight"]
        return left == 0 and now["aborted"] == before["aborted"] + count

    return claim


def assert_proxy_at_rest(site: Site) -> None:
    """Every lease is back and no exchange is open."""
    for gauge in ("doherty_requests_in_flight", "doherty_replica_inflight"):
        until(lambda name=gauge: site.proxy.metric(name) == 0, f"{gauge} is 0")  # type: ignore[misc]
    assert site.proxy.metric("doherty_replica_queued_tokens") == 0


def test_leaving_a_stream(site: Site, client: OpenAI, engines: Engines) -> None:
    before = engines.until_idle()
    with client.chat.completions.create(
        model=engines.model, messages=STORY, max_tokens=LONG, stream=True
    ) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                break
        assert engines.counts()["running"] == 1
    engines.until(given_up(before, 1), "the engine stops")
    assert_proxy_at_rest(site)


def test_leaving_a_stream_of_the_other_endpoints(client: OpenAI, engines: Engines) -> None:
    before = engines.until_idle()
    with client.completions.create(
        model=engines.model, prompt=["one", "two"], max_tokens=LONG, stream=True
    ) as stream:
        next(iter(stream))
    # Two prompts are two sequences of one request.
    engines.until(given_up(before, 2), "the engine stops")
    with client.responses.create(
        model=engines.model, input="one", max_output_tokens=LONG, stream=True
    ) as events:
        next(iter(events))
    engines.until(given_up(before, 3), "the engine stops")


async def cancel_when(
    work: Awaitable[Any], engines: Engines, claim: Callable[[Counts], bool]
) -> None:
    """Let `work` run until the engines' counts fulfil `claim`, then cancel it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.to_thread(engines.until, claim, "the request has arrived")
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_cancelling_in_the_prefill_wait(
    site: Site, aclient: AsyncOpenAI, engines: Engines, *, stream: bool
) -> None:
    before = engines.until_idle()
    with engines.paused():

        async def ask() -> None:
            answer = await aclient.chat.completions.create(
                model=engines.model, messages=STORY, max_tokens=LONG, stream=stream
            )
            assert isinstance(answer, AsyncStream)  # vLLM's head is there at once
            async for _ in answer:
                raise AssertionError("a paused engine has nothing to say")

        await cancel_when(ask(), engines, lambda c: c["waiting"] == 1)
        await asyncio.to_thread(engines.until, given_up(before, 1), "the engine forgets it")
    await asyncio.to_thread(assert_proxy_at_rest, site)


async def test_cancelling_an_answer_that_is_not_streamed(
    site: Site, aclient: AsyncOpenAI, engines: Engines
) -> None:
    before = engines.until_idle()
    work = aclient.chat.completions.create(model=engines.model, messages=STORY, max_tokens=LONG)
    await cancel_when(work, engines, lambda c: c["running"] == 1)
    await asyncio.to_thread(engines.until, given_up(before, 1), "the engine stops")
    await asyncio.to_thread(assert_proxy_at_rest, site)


async def test_cancelling_many_streams(site: Site, aclient: AsyncOpenAI, engines: Engines) -> None:
    before = engines.until_idle()
    count = 40

    async def follow(number: int) -> None:
        stream = await aclient.chat.completions.create(
            model=engines.model,
            messages=[message(f"Story {number}.")],
            max_tokens=LONG,
            stream=True,
        )
        async for _ in stream:
            pass

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(follow(number)) for number in range(count)]
        await asyncio.to_thread(engines.until, lambda c: c["running"] == count, "all run")
        for task in tasks:
            task.cancel()
    await asyncio.to_thread(engines.until, given_up(before, count), "the engines stop")
    await asyncio.to_thread(assert_proxy_at_rest, site)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_clients_timeout(site: Site, client: OpenAI, engines: Engines, *, stream: bool) -> None:
    before = engines.until_idle()
    hasty = client.with_options(timeout=SHORT_S)

    def ask() -> None:
        answer = hasty.chat.completions.create(
            model=engines.model, messages=STORY, max_tokens=LONG, stream=stream
        )
        list(answer)  # vLLM's head is there at once, and the silence comes after it

    with engines.paused():
        with pytest.raises(openai.APITimeoutError):
            ask()
        engines.until(given_up(before, 1), "the engine forgets it")
    assert_proxy_at_rest(site)


async def test_a_timeout_of_the_async_client(aclient: AsyncOpenAI, engines: Engines) -> None:
    before = engines.until_idle()
    with engines.paused():
        with pytest.raises(openai.APITimeoutError):
            await aclient.with_options(timeout=SHORT_S).chat.completions.create(
                model=engines.model, messages=STORY
            )
        await asyncio.to_thread(engines.until, given_up(before, 1), "the engine forgets it")


# --- the other way round -----------------------------------------------------------------------

CUT_AFTER = 200  # chunks; enough for all of them not to be lost with the connection's end


def test_a_cut_stream_raises_our_message(site: Site, client: OpenAI, engines: Engines) -> None:
    seen: list[str] = []

    def follow() -> None:
        with client.chat.completions.create(
            model=engines.model, messages=STORY, max_tokens=2 * CUT_AFTER, stream=True
        ) as stream:
            seen.extend(c.choices[0].delta.content or "" for c in stream)

    with engines.faulty(f"cut:{CUT_AFTER}"), pytest.raises(openai.APIError) as caught:
        follow()
    error = caught.value
    assert error.code == "replica_lost"
    assert error.type == "server_error"
    assert " failed: " in error.message
    assert any(url.removeprefix("http://") in error.message for url in engines.urls)
    assert 0 < len(seen) <= CUT_AFTER + 1  # one says who speaks
    assert_proxy_at_rest(site)


async def test_a_cut_stream_of_the_async_client(aclient: AsyncOpenAI, engines: Engines) -> None:
    seen: list[str] = []

    async def follow() -> None:
        stream = await aclient.completions.create(
            model=engines.model, prompt="Once", max_tokens=2 * CUT_AFTER, stream=True
        )
        seen.extend([chunk.choices[0].text async for chunk in stream])

    with engines.faulty(f"cut:{CUT_AFTER}"), pytest.raises(openai.APIError) as caught:
        await follow()
    assert caught.value.code == "replica_lost"
    assert " failed: " in caught.value.message


def test_a_cut_stream_of_events(client: OpenAI, engines: Engines) -> None:
    seen: list[str] = []

    def follow() -> None:
        with client.responses.create(
            model=engines.model, input="Once", max_output_tokens=2 * CUT_AFTER, stream=True
        ) as events:
            seen.extend(event.type for event in events)

    with engines.faulty(f"cut:{CUT_AFTER}"), pytest.raises(openai.APIError) as caught:
        follow()
    assert caught.value.code == "replica_lost"
    assert seen[0] == "response.created"
    assert seen[-1] == "response.output_text.delta"


def test_a_cut_answer_that_was_not_streamed(client: OpenAI, engines: Engines) -> None:
    with engines.faulty("cut:1"), pytest.raises(openai.APIError) as caught:
        client.chat.completions.create(model=engines.model, messages=STORY, max_tokens=50)
    # Half of it was out, with a length: the client sees a broken transfer, or, when the half was
    # lost with the connection, our 502.
    broken = isinstance(caught.value, openai.APIConnectionError)
    assert broken or caught.value.code == "replica_lost"


def test_an_engines_own_error_event_is_passed_on(client: OpenAI, engines: Engines) -> None:
    with (
        engines.faulty("error:3"),
        client.chat.completions.create(
            model=engines.model, messages=STORY, max_tokens=50, stream=True
        ) as stream,
        pytest.raises(openai.APIError, match="the engine failed"),
    ):
        list(stream)
