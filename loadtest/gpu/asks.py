"""The requests of a proof: what is asked, and what came back that is judged.

Prompts of exact lengths are token ids, of a range that every vocabulary has. Where the proxy's
reading of text is what is judged, they are text: words of the kind that the tokenizer of a model
without weights was trained on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from loadtest.client import Client, RequestError
from loadtest.run import RunError
from loadtest.wire import AnswerReader, error_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TIMEOUT_S = 120.0
_IDS = range(300, 8000)
_WORDS = tuple(
    """
    return self value name list key error path file open read write line text data class method
    object module import string number index count start end first last next result state event
    loop task time second thread process memory address buffer socket server client request
    response header body stream token model layer weight cache block queue order price signal
    the a of to in is that for it as with on by this be are from or an at not have if which one
    all can when there other will more some only into than may any these no each how about many
    """.split()  # noqa: SIM905 - read as text
)
_NAMES = ("a", "b", "i", "n", "x", "ptr", "buf", "len")
_SIGNS = ("=", "+=", "&", "|", "<<", "->", "!=", "%")

Message = dict[str, str]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged of an answer."""

    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # as the engine reported; None: it said nothing
    believed_tokens: int | None = None  # cached, as the proxy had believed
    completion_tokens: int = 0
    first_s: float = 0.0  # from the request to the first token
    total_s: float = 0.0
    events: int = 0
    done: bool = False


def words(count: int, draw: random.Random) -> str:
    """Return some text of `count` words."""
    return " ".join(draw.choices(_WORDS, k=count))


def code(lines: int, draw: random.Random) -> str:
    """Return text of so many lines that has more tokens to its octets than words have."""
    return "".join(
        f"{draw.choice(_NAMES)}[{draw.randrange(1000)}]{draw.choice(_SIGNS)}"
        f"({draw.choice(_NAMES)}{draw.choice(_SIGNS)}0x{draw.randrange(1 << 16):x});\n"
        for _ in range(lines)
    )


def ids(count: int, draw: random.Random) -> list[int]:
    """Return a prompt of exactly `count` tokens."""
    return draw.choices(_IDS, k=count)


def completion(
    model: str, prompt: str | Sequence[int], tokens: int, *, stream: bool = True, **more: Any
) -> bytes:
    return _body(model, tokens, stream, {"prompt": prompt, **more})


def chat(
    model: str, messages: Sequence[Message], tokens: int, *, stream: bool = True, **more: Any
) -> bytes:
    return _body(model, tokens, stream, {"messages": messages, **more})


def _body(model: str, tokens: int, stream: bool, more: dict[str, Any]) -> bytes:
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(body)


async def ask(client: Client, path: str, body: bytes, timeout_s: float = TIMEOUT_S) -> Answer:
    """Send a request and return its answer. Raises `RunError` saying what was wrong with it."""
    loop = asyncio.get_running_loop()
    begun_s, clock_s = loop.time(), client.now_s()
    try:
        async with asyncio.timeout(timeout_s):
            reader = await client.post(path, body)
    except TimeoutError:
        raise RunError(f"no whole answer to {path} in {timeout_s:g} s") from None
    except RequestError as error:
        raise RunError(f"{path}: {error}") from error
    return read_answer(reader, clock_s, loop.time() - begun_s)


def read_answer(reader: AnswerReader, sent_s: float, total_s: float) -> Answer:
    """Return what an answer says. Raises `RunError` for an error."""
    if reader.status != 200:
        raise RunError(f"status {reader.status}: {_said(reader.body)}")
    if reader.stream_error:
        raise RunError(f"an error in the stream: {reader.stream_error}")
    usage, text = reader.usage or {}, ""
    if not reader.streamed:
        value = orjson.loads(reader.body)
        usage = value.get("usage") or {}
        choice = (value.get("choices") or [{}])[0]
        text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
    believed = reader.headers.get("x-doherty-cached-tokens", "")
    return Answer(
        text=text,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        cached_tokens=cached_tokens(usage),
        believed_tokens=int(believed) if believed.isdecimal() else None,
        completion_tokens=int(usage.get("completion_tokens") or 0),
        first_s=reader.first_content_s - sent_s if reader.first_content_s else 0.0,
        total_s=total_s,
        events=reader.content_events,
        done=reader.done_seen,
    )


def cached_tokens(usage: dict[str, Any]) -> int | None:
    """Return what an engine says was cached; SGLang leaves the details out where nothing was."""
    details = usage.get("prompt_tokens_details")
    if not isinstance(details, dict):
        return 0 if usage else None
    found = details.get("cached_tokens")
    return int(found) if isinstance(found, int) else 0


def _said(body: bytes) -> str:
    try:
        return error_text(orjson.loads(body))
    except orjson.JSONDecodeError:
        return body[:200].decode("utf-8", "replace")
