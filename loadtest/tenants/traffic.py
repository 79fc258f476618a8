"""Senders of requests, each with a key, a class and a pace of its own, and what each request met.

A sender is an open loop: requests begin at moments drawn from a seed (Poisson) or evenly, whatever
becomes of those before. No two prompts share their beginning, so every prompt is computed, and what
a tenant was given is what its whole answers count: prompt and completion tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Sequence

import msgspec
import orjson

from loadtest.client import Client, RequestError
from loadtest.faults import outcome
from loadtest.fleet import MODEL, local
from loadtest.prompts import WORD_BYTES, WORD_LENGTH_BYTES
from loadtest.replay import WallClock
from loadtest.wire import AnswerReader

ANSWER_S_MAX = 120.0
COMPLETE = "complete"
_TEXT_WORDS = 16_384
_TEXT = b"".join(random.Random(1).choices(WORD_BYTES, k=_TEXT_WORDS)).decode()


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """Who sends what, and how often."""

    name: str
    key: str
    rate: float  # requests begun a second
    prompts: tuple[int, ...]  # tokens; each request has one of these
    output_tokens: int
    even: bool = False  # at even distances, else Poisson
    tier: str = ""  # service_tier; empty: none said
    deadline_ms: int = 0  # wanted time to first token; 0: none said


class Record(msgspec.Struct):
    """One request as its client saw it. Moments are 0 until they come."""

    sender: str
    due_s: float
    first_s: float = 0.0
    ended_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    fate: str = "open"

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """How long all send, and what they draw from; `name` makes its prompts its own."""

    name: str
    seconds: float
    seed: int


async def send(
    port: int, senders: Sequence[Sender], course: Course
) -> tuple[list[Record], float, float]:
    """Have all send; return what came of each request, and when that began and ended.

    What is under way at the end is cut off: who measures looks at the time in between.
    """
    clock = WallClock()
    records: list[Record] = []
    begun_s = clock.now_s()
    async with asyncio.TaskGroup() as group, contextlib.AsyncExitStack() as stack:
        loops = []
        under_way: set[asyncio.Task[None]] = set()
        for sender in senders:
            client = Client(local(port), clock.now_s, api_key=sender.key, explain=False)
            stack.callback(client.close)

            def begin(
                record: Record, name: str, client: Client = client, by: Sender = sender
            ) -> None:
                task = group.create_task(_one(client, clock, by, record, name))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

            loops.append(group.create_task(_loop(clock, begun_s, sender, course, records, begin)))
        for each in loops:
            await each
        ended_s = clock.now_s()
        for task in under_way:
            task.cancel()
    return records, begun_s, ended_s


async def _loop(
    clock: WallClock,
    begun_s: float,
    sender: Sender,
    course: Course,
    records: list[Record],
    begin: Callable[[Record, str], None],
) -> None:
    draw = random.Random(f"{course.seed} {sender.name}")
    due_s = 0.0
    for number in itertools.count():
        due_s += 1.0 / sender.rate if sender.even else draw.expovariate(sender.rate)
        if due_s >= course.seconds:
            break
        await asyncio.sleep(max(0.0, begun_s + due_s - clock.now_s()))
        record = Record(sender=sender.name, due_s=begun_s + due_s)
        record.prompt_tokens = draw.choice(sender.prompts)
        records.append(record)
        begin(record, f"{course.name} {course.seed} {sender.name} {number}")
    await asyncio.sleep(max(0.0, begun_s + course.seconds - clock.now_s()))


async def _one(client: Client, clock: WallClock, sender: Sender, record: Record, name: str) -> None:
    reader = AnswerReader()
    fields = f"x-slo-ttft-ms: {sender.deadline_ms}\r\n" if sender.deadline_ms else ""
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            body = request_body(sender, record.prompt_tokens, name)
            await client.post("/v1/chat/completions", body, fields, reader)
        record.fate = ": ".join(filter(None, outcome(reader, streamed=True)))
    except RequestError as error:
        record.fate = error.kind
    except TimeoutError:
        record.fate = f"no end in {ANSWER_S_MAX:g} s"
    finally:
        record.first_s, record.ended_s = reader.first_content_s, clock.now_s()
        if reader.usage is not None:
            usage = reader.usage
            record.tokens = usage["prompt_tokens"] + usage["completion_tokens"]


def request_body(sender: Sender, prompt_tokens: int, name: str) -> bytes:
    """Return a request whose prompt shares no beginning with any other."""
    text = f"{name} {_TEXT}"[: prompt_tokens * WORD_LENGTH_BYTES]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": sender.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sender.tier:
        body["service_tier"] = sender.tier
    return orjson.dumps(body)
