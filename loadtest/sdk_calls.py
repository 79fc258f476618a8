"""Calls of our own by the official client, for what its own tests leave out.

They read streams to their end and leave them before it, by the synchronous client and the
asynchronous one; each returns nothing, or raises. The engine is told apart by what it counts, so
that a stream whose reader left must be seen to stop there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from loadtest.sdk_engine import EMBEDDING, ENDLESS, MODEL, WORDS, SdkEngine

MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Say hello."}]
STORED = "chatcmpl-123"
TEXT = "".join(WORDS)
CUT_SEEN_S = 5.0
PIECES_BEFORE_CUT = 8


def _expect(found: object, due: object) -> None:
    if found != due:
        raise AssertionError(f"{found!r} instead of {due!r}")


# --- the synchronous client ------------------------------------------------------------------


def chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    _expect(answer.choices[0].message.content, TEXT)


def chat_raw(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    _expect(raw.parse().choices[0].message.content, TEXT)
    _expect(bool(raw.headers.get("content-type")), True)


def chat_stream(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options=options
    )
    chunks = list(stream)
    _expect("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), TEXT)
    _expect(chunks[-1].usage is not None, True)


def completion_stream(client: OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="Say hello.", stream=True)
    _expect("".join(chunk.choices[0].text for chunk in stream), TEXT)


def embeddings(client: OpenAI) -> None:
    for encoding in ("float", "base64"):
        extra: Any = {"encoding_format": encoding} if encoding == "float" else {}
        answer = client.embeddings.create(model=MODEL, input="hello", **extra)
        _expect(tuple(answer.data[0].embedding), EMBEDDING)


def models(client: OpenAI) -> None:
    _expect(MODEL in [model.id for model in client.models.list()], True)
    _expect(client.models.retrieve(MODEL).id, MODEL)


def stored(client: OpenAI) -> None:
    calls = client.chat.completions
    _expect(calls.retrieve(STORED).id, STORED)
    _expect(calls.update(STORED, metadata={"a": "b"}).metadata, {"a": "b"})
    _expect([kept.object for kept in calls.list()], ["chat.completion"])
    _expect([message.content for message in calls.messages.list(STORED)], [TEXT])
    _expect(calls.delete(STORED).deleted, True)


def unknown_path(client: OpenAI) -> None:
    try:
        client.get("/no/such/path", cast_to=object)
    except NotFoundError:
        return
    raise AssertionError("a path that is not there was served")


def leave_stream(client: OpenAI) -> None:
    with client.chat.completions.create(model=ENDLESS, messages=MESSAGES, stream=True) as stream:
        for _ in range(PIECES_BEFORE_CUT):
            next(stream)


# --- the asynchronous one --------------------------------------------------------------------


async def achat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    _expect(answer.choices[0].message.content, TEXT)


async def achat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    _expect("".join([c.choices[0].delta.content or "" async for c in stream if c.choices]), TEXT)


async def aleave_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=ENDLESS, messages=MESSAGES, stream=True)
    async with stream:
        for _ in range(PIECES_BEFORE_CUT):
            await anext(stream)


async def acancel_stream(client: AsyncOpenAI) -> None:
    """The reader is cancelled while it waits for the next piece."""
    begun = asyncio.Event()

    async def read() -> None:
        stream = await client.chat.completions.create(model=ENDLESS, messages=MESSAGES, stream=True)
        async with stream:
            async for _ in stream:
                begun.set()

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read())
        await begun.wait()
        reader.cancel()


async def acancel_many(client: AsyncOpenAI) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(acancel_stream(client))


SYNC: tuple[Callable[[OpenAI], None], ...] = (
    *(chat, chat_raw, chat_stream, completion_stream, embeddings, models, stored, unknown_path),
    leave_stream,
)
ASYNC: tuple[Callable[[AsyncOpenAI], Awaitable[None]], ...] = (
    *(achat, achat_stream, aleave_stream, acancel_stream, acancel_many),
)
CUTS = {leave_stream: 1, aleave_stream: 1, acancel_stream: 1, acancel_many: 8}


async def run_calls(base_url: str, engine: SdkEngine) -> dict[str, str]:
    """Make every call; return for each what went wrong, or nothing."""
    settings: dict[str, Any] = {"base_url": base_url, "api_key": "none", "max_retries": 0}
    results: dict[str, str] = {}
    with OpenAI(**settings) as client:
        for call in SYNC:
            made = asyncio.to_thread(call, client)
            results[f"sync {call.__name__}"] = await _judge(made, engine, CUTS.get(call, 0))
    async with AsyncOpenAI(**settings) as aclient:
        for acall in ASYNC:
            cuts = CUTS.get(acall, 0)
            results[f"async {acall.__name__}"] = await _judge(acall(aclient), engine, cuts)
    return results


async def _judge(call: Awaitable[None], engine: SdkEngine, cuts_due: int) -> str:
    before = engine.streams_cut
    try:
        await call
    except Exception as error:  # noqa: BLE001 - whatever a client raises is the finding
        return f"{type(error).__name__}: {error}"[:200]
    end_s = time.monotonic() + CUT_SEEN_S
    while engine.streams_cut < before + cuts_due:
        if time.monotonic() > end_s:
            return f"the engine saw {engine.streams_cut - before} of {cuts_due} readers leave"
        await asyncio.sleep(0.01)
    return ""
