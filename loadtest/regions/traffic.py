"""Requests to regions in an open loop, and what became of each, as its client saw it."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterable, Sequence

import msgspec
import orjson

from loadtest.client import Client, RequestError
from loadtest.faults import outcome
from loadtest.fleet import MODEL
from loadtest.measure import quantile
from loadtest.regions.stage import Region
from loadtest.wire import AnswerReader

ANSWER_S_MAX = 180.0
CHAT = "/v1/chat/completions"
COMPLETE = "complete"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked."""

    prompt_words: int = 240
    output_tokens: int = 60
    turns: int = 4  # of each conversation


class Request(msgspec.Struct):
    """One request. Moments are of the lab's clock."""

    home: str
    begun_s: float
    first_s: float = 0.0
    ended_s: float = 0.0
    fate: str = "open"
    begun: bool = False  # the head of an answer has come that is no refusal
    region: str = ""
    cached_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.begun_s

    @property
    def lost(self) -> bool:
        """It failed, and no head of an answer had come."""
        return self.fate != COMPLETE and not self.begun

    @property
    def broken(self) -> bool:
        """It failed amid its answer."""
        return self.fate != COMPLETE and self.begun


async def send(client: Client, request: Request, body: bytes) -> Request:
    reader = AnswerReader()
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await client.post(CHAT, body, reader=reader)
        request.fate = ": ".join(filter(None, outcome(reader, streamed=reader.streamed)))
    except RequestError as error:
        request.fate = error.kind
    except TimeoutError:
        request.fate = f"no end in {ANSWER_S_MAX:g} s"
    request.ended_s = client.now_s()
    request.begun = reader.status == 200
    request.first_s = reader.first_content_s or (request.ended_s if reader.body else 0.0)
    request.region = reader.headers.get("x-doherty-region", "")
    usage = reader.usage or {}
    request.prompt_tokens = usage.get("prompt_tokens") or 0
    request.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return request


def body_of(ask: Ask, home: str, number: int) -> bytes:
    """Return the next turn of one of the conversations that are under way at a region."""
    talk, turn = number // ask.turns, number % ask.turns
    said = f"{home} {talk} " * (ask.prompt_words // 2)
    messages = [{"role": "user", "content": said}]
    for past in range(turn):
        messages += [
            {"role": "assistant", "content": f"answer {past}"},
            {"role": "user", "content": f"and then {past}?"},
        ]
    return orjson.dumps(
        {
            "model": MODEL,
            "messages": messages,
            "max_tokens": ask.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def load(
    region: Region,
    rate_per_s: float,
    seconds: float,
    ask: Ask,
    seed: int,
    going: Callable[[], bool] = lambda: True,
) -> list[Request]:
    """Begin requests at moments drawn from a seed (Poisson), and wait for their ends.

    Turns of one conversation lie apart in time: those of many are taken in turn.
    """
    draw, clock = random.Random(f"{seed} {region.name}"), region.clock
    start_s, due_s = clock.now_s(), 0.0
    found: list[Request] = []
    together = max(1, int(rate_per_s * 8))  # conversations under way
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            due_s += draw.expovariate(rate_per_s)
            if due_s > seconds:
                break
            await asyncio.sleep(max(0.0, start_s + due_s - clock.now_s()))
            if not going():
                continue
            round_number, place = divmod(number, together)
            talk = (round_number // ask.turns) * together + place
            body = body_of(
                ask, f"{seed}-{region.name}", talk * ask.turns + round_number % ask.turns
            )
            request = Request(home=region.name, begun_s=clock.now_s())
            found.append(request)
            group.create_task(send(region.client, request, body))
    return found


async def all_load(
    regions: Sequence[Region], rates: Sequence[float], seconds: float, ask: Ask, seed: int
) -> list[Request]:
    """The same for several regions at once."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(load(region, rate, seconds, ask, seed))
            for region, rate in zip(regions, rates, strict=True)
            if rate > 0
        ]
    return [request for task in tasks for request in task.result()]


async def saturated_per_s(region: Region, together: int, seconds: float, ask: Ask) -> float:
    """Return how many requests a second a region serves while as many as it takes are there."""
    served = 0
    clock = region.clock
    end_s = clock.now_s() + seconds
    begin_s = clock.now_s() + seconds / 3

    async def one(number: int) -> None:
        nonlocal served
        for turn in itertools.count():
            if clock.now_s() > end_s:
                return
            body = body_of(ask, f"saturating-{region.name}", (turn * together + number) * ask.turns)
            done = await send(region.client, Request(home=region.name, begun_s=clock.now_s()), body)
            served += done.fate == COMPLETE and begin_s < done.ended_s <= end_s

    async with asyncio.TaskGroup() as group:
        for number in range(together):
            group.create_task(one(number))
    return served / (end_s - begin_s)


def at_home(requests: Iterable[Request]) -> float:
    """Return the share of requests that were computed where they came."""
    done = [request for request in requests if request.fate == COMPLETE]
    return sum(request.region == request.home for request in done) / max(1, len(done))


def ttft_s(requests: Iterable[Request], share: float) -> float:
    found = [request.ttft_s for request in requests if request.fate == COMPLETE]
    return quantile(found, share) or 0.0
