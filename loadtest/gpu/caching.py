"""Steps: what the proxy believes is cached against what the engine reports, and KV memory in use.

*Predicted* is what the proxy told with each answer (`x-doherty-cached-tokens`): its belief at the
moment of the decision. *Reported* is the engine's `cached_tokens`. The error is their difference
in percent of the prompt's tokens. Prompts that share nothing are easy to predict, so the median
that is judged leaves them out. The proxy has no tokenizer and reckons with one mean length of a
token; a few prompts of another kind of text than the rest show, unjudged, what that costs.

Evictions are caused behind the proxy's back: prompts go to the engine directly until its cache has
been turned over. Only the engine's events can tell the proxy that what it sent before is gone. Then
half as much again, which what was asked last must outlive.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence

import msgspec
import orjson

from loadtest.client import RequestError
from loadtest.gpu import asks, events
from loadtest.gpu.asks import CHAT, COMPLETIONS, Answer, Message
from loadtest.gpu.gauges import EngineLoad, proxy_series
from loadtest.gpu.scene import Scene
from loadtest.gpu.steps import Findings, SkipError

ERROR_PERCENT_MAX = 5.0
CODE_REQUESTS = 8
HEADS = 4
CONVERSATIONS = 6
ANSWER_TOKENS = 24
FRESH, HEAD, TURN, REPEAT = "fresh", "shared head", "next turn", "repeated"
CODE = "shared code"
GONE, STILL_THERE = "after eviction", "still there"
SETTLE_S = 0.5  # events are on their way, and the follower tells of them in ticks
SOURCE_PATIENCE_S = 10.0  # until the proxy judges by events
RESIDENT_PATIENCE_S = 8.0  # the proxy's figure is told among its parts every few seconds
RESIDENT_ERROR_MAX = 0.01
POLL_S = 0.1
AT_REST_RATIO_MAX = 0.01
OCCUPANCY_SHARE_MIN = 0.6  # of the engine's largest, that the proxy's largest reading must reach
OCCUPANCY_PATIENCE_S = 8.0  # loads are read about once a second


class Guess(msgspec.Struct, frozen=True, kw_only=True):
    """One request: what was predicted, and what was so."""

    kind: str
    prompt_tokens: int
    predicted: int
    reported: int

    @property
    def error_percent(self) -> float:
        return 100.0 * (self.predicted - self.reported) / max(1, self.prompt_tokens)


def drawn_kinds(count: int, draw: random.Random) -> list[str]:
    """Return the kinds of the requests, in their order: a fixed mix, shuffled."""
    mix = (HEAD, TURN, REPEAT, TURN, FRESH)
    kinds = [mix[index % len(mix)] for index in range(count)]
    draw.shuffle(kinds)
    return kinds


class Asker:
    """Asks in kinds, and remembers what was asked, so that it can be asked again."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._draw = scene.draw
        words = scene.measure.head_words
        self._heads = [self._system(words // 2 + at * words // 2) for at in range(HEADS)]
        self._talks = [[self._system(words // 3)] for _ in range(CONVERSATIONS)]
        self._code = {"role": "system", "content": asks.code(words // 8, self._draw)}
        self.asked: list[list[Message]] = []

    def _system(self, count: int) -> Message:
        return {"role": "system", "content": asks.words(max(20, count), self._draw)}

    def _user(self, fewest: int, most: int) -> Message:
        return {"role": "user", "content": asks.words(self._draw.randint(fewest, most), self._draw)}

    def _messages(self, kind: str) -> list[Message]:
        if kind == HEAD:
            return [self._draw.choice(self._heads), self._user(30, 400)]
        if kind == CODE:
            return [self._code, {"role": "user", "content": asks.code(8, self._draw)}]
        if kind == REPEAT and self.asked:
            return list(self._draw.choice(self.asked))
        return [self._system(self._draw.randint(50, 900)), self._user(20, 200)]

    async def ask(self, kind: str) -> Guess:
        """Send one request. Raises `RunError`."""
        if kind == TURN:
            talk = self._draw.choice(self._talks)
            talk.append(self._user(20, 150))
            answer = await self.send(list(talk))
            talk.append({"role": "assistant", "content": answer.text})
        else:
            answer = await self.send(self._messages(kind))
        return guess(kind, answer)

    async def send(self, messages: list[Message]) -> Answer:
        self.asked.append(messages)
        body = asks.chat(self._scene.model, messages, ANSWER_TOKENS, stream=False)
        return await asks.ask(self._scene.proxy, CHAT, body)


def guess(kind: str, answer: Answer) -> Guess:
    return Guess(
        kind=kind,
        prompt_tokens=answer.prompt_tokens,
        predicted=answer.believed_tokens or 0,
        reported=answer.cached_tokens or 0,
    )


def judged(guesses: Sequence[Guess]) -> dict[str, float]:
    """Return the errors in percent of the prompt: of all that share something."""
    errors = [one.error_percent for one in guesses if one.kind != FRESH]
    sizes = sorted(abs(error) for error in errors)
    return {
        "median_error_percent": statistics.median(sizes),
        "p90_error_percent": sizes[int(0.9 * (len(sizes) - 1))],
        "mean_signed_error_percent": statistics.fmean(errors),
    }


def table(guesses: Sequence[Guess]) -> str:
    """Return the errors by kind."""
    lines = [
        f"{'':<16}{'n':>4}{'prompt':>8}{'predicted':>11}{'reported':>10}{'median |error|':>16}"
    ]
    for kind in dict.fromkeys(one.kind for one in guesses):
        of = [one for one in guesses if one.kind == kind]
        error = statistics.median(abs(one.error_percent) for one in of)
        means = [
            statistics.fmean(getattr(one, name) for one in of)
            for name in ("prompt_tokens", "predicted", "reported")
        ]
        lines.append(
            f"{kind:<16}{len(of):>4}{means[0]:>8.0f}{means[1]:>11.0f}{means[2]:>10.0f}"
            f"{error:>12.2f} %"
        )
    return "\n".join(lines)


async def prediction(scene: Scene, found: Findings) -> None:
    """Predicted against reported cached tokens, over varied requests."""
    asker = Asker(scene)
    for kind in drawn_kinds(scene.measure.warmup, scene.draw):
        await asker.ask(kind)
    found.claim(await _by_events(scene), "the proxy judges the engine's cache by its events")
    kinds = drawn_kinds(scene.measure.requests, scene.draw)
    guesses = [await asker.ask(kind) for kind in kinds]
    found.figures |= judged(guesses)
    error = found.figures["median_error_percent"]
    found.claim(
        isinstance(error, float) and error <= ERROR_PERCENT_MAX,
        f"the median error is at most {ERROR_PERCENT_MAX:g} % of the prompt",
    )
    scene.asked = asker
    await asker.ask(CODE)
    other = [await asker.ask(CODE) for _ in range(CODE_REQUESTS)]
    found.figures["other_text_median_error_percent"] = judged(other)["median_error_percent"]
    found.table = table([*guesses, *other])


async def _by_events(scene: Scene) -> bool:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + SOURCE_PATIENCE_S
    while not events.judged_by_events(await proxy_series(scene.admin)):
        if loop.time() > deadline_s:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def events_heard(scene: Scene, found: Findings) -> None:
    """What the engine told of its cache, what the proxy made of it."""
    if scene.listener is None:
        raise SkipError("nobody says where this engine's events are")
    told, loop = scene.listener.told, asyncio.get_running_loop()
    deadline_s = loop.time() + RESIDENT_PATIENCE_S
    while True:
        stored_tokens = sum(told.blocks.values())
        resident_tokens, source = await _resident(scene)
        near = abs((resident_tokens or 0) - stored_tokens) <= RESIDENT_ERROR_MAX * stored_tokens
        if near or loop.time() > deadline_s:
            break
        await asyncio.sleep(POLL_S)
    found.figures |= {
        "batches": told.batches,
        "holes": told.holes,
        "blocks_stored": told.stored,
        "blocks_removed": told.removed,
        "unread": told.unread,
        "lag_median_s": statistics.median(told.lags_s) if told.lags_s else None,
        "stored_tokens_told": stored_tokens,
        "stored_tokens_proxy": resident_tokens,
        "source": source,
    }
    found.claim(told.batches > 0, "events were heard")
    found.claim(told.unread == 0 and told.holes == 0, "each was read, none was missed")
    found.claim(source == "events", "the proxy judges by events")
    found.claim(near, "the proxy counts the tokens that the engine told")


async def _resident(scene: Scene) -> tuple[int | None, str]:
    """Return how many tokens the proxy believes stored, and by what it judges."""
    body = asks.chat(scene.model, [{"role": "user", "content": "Say hello."}], 1)
    reader = await scene.admin.post(f"/debug/route?path={CHAT}", body)
    for candidate in orjson.loads(reader.body).get("candidates", ()):
        return candidate.get("resident_tokens"), str(candidate.get("cache_source"))
    return None, "no candidate"


async def evictions(scene: Scene, found: Findings) -> None:
    """The engine's cache is turned over behind the proxy's back; predictions must follow."""
    capacity, measure = (await scene.gauge.read()).kv_capacity_tokens, scene.measure
    if not 0 < capacity <= measure.flood_tokens_max:
        raise SkipError(f"a KV cache of {capacity:,} tokens is not flooded")
    asker = scene.asked if scene.asked is not None else Asker(scene)
    old = asker.asked[: measure.revisits]
    guesses, flood_tokens = [], 0
    for kind, turnover in ((GONE, 1.1), (STILL_THERE, 0.5)):
        flood_tokens += await _flood(scene, int(turnover * capacity))
        guesses += [guess(kind, await asker.send(messages)) for messages in old]
    told = scene.listener.told if scene.listener is not None else events.Told()
    found.figures |= {"flood_tokens": flood_tokens, **judged(guesses)}
    found.figures["blocks_removed"] = told.removed
    found.table = table(guesses)
    error = found.figures["median_error_percent"]
    found.claim(
        isinstance(error, float) and error <= ERROR_PERCENT_MAX,
        f"the median error is at most {ERROR_PERCENT_MAX:g} % of the prompt",
    )


async def _flood(scene: Scene, tokens: int) -> int:
    """Send new prompts of so many tokens in all to the engine, past the proxy."""
    each = scene.measure.flood_prompt_tokens
    prompts = -(-tokens // each)
    for _ in range(prompts):
        prompt = asks.ids(each, scene.draw)
        await asks.ask(scene.engine, COMPLETIONS, asks.completion(scene.model, prompt, 1))
    await asyncio.sleep(SETTLE_S)
    return prompts * each


async def occupancy(scene: Scene, found: Findings) -> None:
    """KV memory in use: the proxy's reading follows the engine's while prompts run, and back."""
    measure = scene.measure
    before = await _proxys_ratio(scene)
    crowd = [
        asyncio.ensure_future(
            asks.ask(
                scene.proxy,
                COMPLETIONS,
                asks.completion(
                    scene.model,
                    asks.words(measure.crowd_words, scene.draw),
                    measure.crowd_output_tokens,
                ),
            )
        )
        for _ in range(measure.crowd)
    ]
    largest, seen = EngineLoad(), 0.0
    try:
        while not all(asked.done() for asked in crowd):
            load = await scene.gauge.read()
            largest = max(largest, load, key=lambda one: one.kv_used_ratio)
            seen = max(seen, await _proxys_ratio(scene))
            await asyncio.sleep(POLL_S)
        for asked in crowd:
            await asked
    finally:
        for asked in crowd:
            asked.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    after, waited_s = await _at_rest(scene, before)
    found.figures |= {
        "engine_largest_percent": 100 * largest.kv_used_ratio,
        "proxy_largest_percent": 100 * seen,
        "proxy_before_percent": 100 * before,
        "proxy_after_percent": 100 * after,
        "back_after_s": waited_s,
    }
    found.claim(largest.kv_used_ratio > AT_REST_RATIO_MAX, "the engine's own reading rose")
    found.claim(seen >= OCCUPANCY_SHARE_MIN * largest.kv_used_ratio, "the proxy's reading followed")
    found.claim(after <= before + AT_REST_RATIO_MAX, "and came back")


async def _at_rest(scene: Scene, before: float) -> tuple[float, float]:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    while True:
        ratio, waited_s = await _proxys_ratio(scene), loop.time() - begun_s
        if ratio <= before + AT_REST_RATIO_MAX or waited_s > OCCUPANCY_PATIENCE_S:
            return ratio, waited_s
        await asyncio.sleep(POLL_S)


async def _proxys_ratio(scene: Scene) -> float:
    """Return what the proxy's fleet says of the KV memory in use."""
    try:
        reader = await scene.admin.get("/replicas")
    except RequestError:
        return 0.0
    shown = orjson.loads(reader.body).get("replicas") or [{}]
    return float(shown[0].get("kv_used_ratio") or 0.0)
