"""The official Anthropic client before every engine: messages, streams, and errors that it reads.

What it is told of an error it takes from `error.type` and `error.message`; events without a name it
skips, so the last event of a cut stream must have one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import MessageParam

from tests.contract.conftest import CLIENT_TIMEOUT_S, KEY, Site
from tests.fakes.engines import Engines

HELLO: list[MessageParam] = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
def claude(site: Site) -> Iterator[Anthropic]:
    with Anthropic(
        base_url=site.proxy.url, api_key=KEY, max_retries=0, timeout=CLIENT_TIMEOUT_S
    ) as made:
        yield made


@pytest.fixture
async def aclaude(site: Site) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        base_url=site.proxy.url, api_key=KEY, max_retries=0, timeout=CLIENT_TIMEOUT_S
    ) as made:
        yield made


def test_a_message_and_its_stream_say_the_same(claude: Anthropic, engines: Engines) -> None:
    whole = claude.messages.create(model=engines.model, messages=HELLO, max_tokens=5)
    assert whole.stop_reason == "max_tokens"
    with claude.messages.stream(model=engines.model, messages=HELLO, max_tokens=5) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == 5
    assert whole.content[0].type == "text"
    assert whole.content[0].text == text != ""


def test_tokens_are_counted(claude: Anthropic, engines: Engines) -> None:
    assert claude.messages.count_tokens(model=engines.model, messages=HELLO).input_tokens > 0


async def test_the_asynchronous_client_streams(aclaude: AsyncAnthropic, engines: Engines) -> None:
    async with aclaude.messages.stream(model=engines.model, messages=HELLO, max_tokens=5) as stream:
        assert "".join([text async for text in stream.text_stream])


async def test_a_reader_that_leaves_stops_the_engine(
    aclaude: AsyncAnthropic, engines: Engines
) -> None:
    before = engines.counts()["aborted"]
    async with aclaude.messages.stream(
        model=engines.model, messages=HELLO, max_tokens=100_000
    ) as stream:
        async for _ in stream.text_stream:
            break
    engines.until(lambda counts: counts["aborted"] == before + 1, "an abort")


def test_our_refusal_has_its_type(claude: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="claude-nobody", messages=HELLO, max_tokens=5)
    assert caught.value.type == "not_found_error"
    assert "claude-nobody" in str(caught.value)


def test_an_engines_refusal_has_its_type(claude: Anthropic, engines: Engines) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=engines.model, messages=[], max_tokens=5)
    assert caught.value.type == "invalid_request_error"
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"type", "error"}


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (503, "overloaded_error")])
def test_overload_is_told_and_repeated(
    claude: Anthropic, engines: Engines, status: int, kind: str
) -> None:
    with engines.faulty(f"status:{status}"):
        with pytest.raises(anthropic.APIStatusError) as caught:
            claude.messages.create(model=engines.model, messages=HELLO, max_tokens=5)
        assert (caught.value.status_code, caught.value.type) == (status, kind)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.response.headers["x-should-retry"] == "true"
    with engines.faulty(f"status:{status}:times=1"):
        patient = claude.with_options(max_retries=2)
        assert patient.messages.create(model=engines.model, messages=HELLO, max_tokens=1).content


def test_a_cut_stream_raises(claude: Anthropic, engines: Engines) -> None:
    with engines.faulty("cut:200"), pytest.raises(anthropic.APIStatusError) as caught:
        list(
            claude.messages.create(model=engines.model, messages=HELLO, max_tokens=400, stream=True)
        )
    assert caught.value.type == "api_error"
    assert "replica_lost" in str(caught.value)
