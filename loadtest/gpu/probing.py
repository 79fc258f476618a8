"""Measurements of a running engine, as a client sees them.

Prompts are lists of token ids that nobody has sent before, so that nothing is cached that should
not be, and no tokenizer's work is in the figures. Time to first token is asked for alone; decode
is taken from the stretch in which every answer of the batch is under way, so that neither the
intake of the last prompt nor the end of the first answer is in it.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from collections.abc import Sequence

import msgspec
import orjson
from typing_extensions import override

from loadtest.client import Client, RequestError
from loadtest.gpu import records
from loadtest.gpu.records import TAIL_TOKENS, Decode, FirstToken
from loadtest.run import RunError
from loadtest.wire import AnswerReader, error_text

TOKEN_IDS = range(300, 8000)  # of any tokenizer; ordinary ones, none that ends an answer
REQUEST_TIMEOUT_S = 120.0
STEADY_EVENTS_MIN = 16  # of an answer, for a rate to mean something
SEEN_ASKS = 3  # of a prompt that is cached: short times, so what disturbs them shows more
POOL_SHARE_MAX = 0.9  # of the KV cache that a batch may fill

_LABEL = r'{}="([0-9]+)"'
_GAUGE = re.compile(r"^sglang:max_total_num_tokens\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)


class TimedReader(AnswerReader):
    """Also keeps when each token came."""

    __slots__ = ("times_s",)

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    @override
    def feed(self, data: bytes, now_s: float) -> bool:
        complete = super().feed(data, now_s)
        self.times_s += [now_s] * (self.content_events - len(self.times_s))
        return complete


class Answer(msgspec.Struct, frozen=True):
    """What came of one request."""

    sent_s: float
    times_s: list[float]  # of the events that carried text
    tokens: int
    cached_tokens: int

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.times_s[0] - self.sent_s


class Probe:
    """One engine under measurement."""

    def __init__(self, client: Client, model: str, seed: int) -> None:
        self.client = client
        self.model = model
        self._random = random.Random(seed)

    def prompt(self, tokens: int) -> list[int]:
        """Return a prompt that nobody has sent."""
        return self._random.choices(TOKEN_IDS, k=tokens)

    async def ask(self, prompt: list[int], tokens: int) -> Answer:
        """Stream an answer of exactly so many tokens. Raises `RunError` when it does not come."""
        body = orjson.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        reader = TimedReader()
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self.client.post("/v1/completions", body, reader=reader)
        except RequestError as error:
            raise RunError(f"a prompt of {len(prompt)} tokens: {error}") from error
        except TimeoutError as error:
            limit = f"{REQUEST_TIMEOUT_S:g} s"
            raise RunError(f"a prompt of {len(prompt)} tokens: no answer in {limit}") from error
        if reader.status != 200 or reader.stream_error or not reader.times_s:
            said = reader.stream_error or error_text(reader.body.decode("utf-8", "replace"))
            raise RunError(f"a prompt of {len(prompt)} tokens: {reader.status} {said}")
        usage = reader.usage or {}
        details = usage.get("prompt_tokens_details") or {}
        given = int(usage.get("completion_tokens") or len(reader.times_s))
        return Answer(sent_s, reader.times_s, given, int(details.get("cached_tokens") or 0))

    async def first_token(self, tokens: int, repeats: int) -> FirstToken:
        """Measure the time to the first token of a prompt, new, seen, and seen but for its end."""
        cold_s, cached_s, tail_s = [], [], []
        cached_tokens = 0
        for _ in range(repeats):
            prompt = self.prompt(tokens)
            cold_s.append((await self.ask(prompt, 1)).first_s)
            for _ in range(SEEN_ASKS):
                again = await self.ask(prompt, 1)
                cached_s.append(again.first_s)
                cached_tokens = again.cached_tokens
                if tokens > 2 * TAIL_TOKENS:
                    branch = [*prompt[:-TAIL_TOKENS], *self.prompt(TAIL_TOKENS)]
                    tail_s.append((await self.ask(branch, 1)).first_s)
        return records.first_token(tokens, cold_s, cached_s, tail_s, cached_tokens)

    async def decode(self, prompts: Sequence[list[int]], tokens: int, repeats: int) -> Decode:
        """Measure the time per token while all prompts, already cached, are answered."""
        await asyncio.gather(*(self.ask(prompt, 1) for prompt in prompts))
        rates, contexts = [], []
        for _ in range(repeats):
            answers = await asyncio.gather(*(self.ask(prompt, tokens) for prompt in prompts))
            rate, before = steady(answers)
            rates.append(rate)
            contexts.append(len(prompts[0]) + before)
        return Decode(
            batch=len(prompts),
            context_tokens=round(statistics.mean(contexts)),
            token_ms=round(statistics.median(rates) * 1e3, 3),
            repeats=repeats,
        )


def steady(answers: Sequence[Answer]) -> tuple[float, float]:
    """Return seconds a token, and the tokens an answer has on average, while all are under way.

    An engine that is ahead of its reader puts several tokens into an event, so events are weighed
    by what the whole answer had. Raises `RunError` when the stretch was too short to tell.
    """
    begin_s = max(answer.times_s[0] for answer in answers)
    end_s = min(answer.times_s[-1] for answer in answers)
    rates, lengths = [], []
    for answer in answers:
        times_s = answer.times_s
        inside = [index for index, at_s in enumerate(times_s) if begin_s <= at_s <= end_s]
        if len(inside) < STEADY_EVENTS_MIN:
            raise RunError(
                f"a batch of {len(answers)} was answered together for {len(inside)} tokens only; "
                "give it longer answers"
            )
        first, last = inside[0], inside[-1]
        event_tokens = answer.tokens / len(times_s)
        rates.append((times_s[last] - times_s[first]) / (last - first) / event_tokens)
        lengths.append(((first + last) / 2 + 1) * event_tokens)
    return statistics.median(rates), statistics.mean(lengths)


async def get_text(client: Client, path: str) -> str:
    """Return a page; empty when there is none."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            answer = await client.get(path)
    except (RequestError, TimeoutError):
        return ""
    return answer.body.decode("utf-8", "replace") if answer.status == 200 else ""


async def engine_version(client: Client) -> str:
    """Return the engine's release as it names it."""
    for path in ("/version", "/server_info", "/get_server_info"):
        try:
            value = orjson.loads(await get_text(client, path) or "null")
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict) and value.get("version"):
            return str(value["version"])
    return "unknown"


async def model_name(client: Client) -> str:
    """Return the name of the model. Raises `RunError` when nobody answers, or names none."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            answer = await client.get("/v1/models")
    except RequestError as error:
        raise RunError(f"{error.detail}; is the engine running there?") from error
    except TimeoutError as error:
        raise RunError(f"/v1/models: no answer in {REQUEST_TIMEOUT_S:g} s") from error
    try:
        rows = orjson.loads(answer.body)["data"]
        return str(rows[0]["id"])
    except (orjson.JSONDecodeError, TypeError, KeyError, IndexError) as error:
        raise RunError("/v1/models names no model; is this an OpenAI endpoint?") from error


async def kv_pool_tokens(client: Client) -> int:
    """Return the size of the KV cache; 0 when the engine does not say."""
    return read_kv_pool(await get_text(client, "/metrics"))


def read_kv_pool(metrics: str) -> int:
    """Return the tokens that the KV cache holds, by the names of either engine."""
    for line in metrics.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            blocks = re.search(_LABEL.format("num_gpu_blocks"), line)
            size = re.search(_LABEL.format("block_size"), line)
            return int(blocks[1]) * int(size[1]) if blocks and size else 0
    found = _GAUGE.search(metrics)
    return int(float(found[1])) if found else 0


def fits(batch: int, context_tokens: int, pool_tokens: int) -> bool:
    """Return whether a batch stays in the KV cache; so assumed of an engine that does not say."""
    return not pool_tokens or batch * context_tokens <= POOL_SHARE_MAX * pool_tokens
