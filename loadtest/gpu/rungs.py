"""One replica taken down the rungs of the ladder and up again, by the manager, timed from outside.

Down is from the wish until the manager says that it rests; up is from the wish until a client's
request through the proxy has been answered. Greedy answers of before are compared with those of
after, word by word, to prompts that were cached and to one that was not.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.client import Client, RequestError
from loadtest.fleet import get
from loadtest.gpu import asks, holding, machine
from loadtest.gpu.asks import COMPLETIONS, Answer
from loadtest.gpu.scene import Scene
from loadtest.gpu.stack import Replica, client, replicas
from loadtest.gpu.steps import Findings, SkipError
from loadtest.run import RunError

PROMPTS, PROMPT_WORDS, ANSWER_TOKENS = 4, 400, 32
POLL_S = 0.01
ASK_S = 5.0  # how long one try of a client may take while the replica comes back
PATIENCE_S = 240.0
COPIES_S_MAX = 90.0
FREED_MIB_MAX = 700  # on a card that was let go of: what a driver may keep for itself
RESTORED = "restored"  # the manager's word for what came from an image


class Seen(msgspec.Struct):
    """What the manager tells of one replica."""

    phase: str = ""
    reason: str = ""
    url: str = ""
    pid: int = 0


class Ladder:
    """The replica, what it answered in the beginning, and what its starts took."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.manager = client(scene.stack.manager_url)
        self.prompts: list[str] = []
        self.reference: list[str] = []
        self.cached_tokens = 0  # of the first prompt, when it was just computed: whole pages
        self.start_s = 0.0  # the measure of all; the quickest with warm caches, once there is one
        self.start_is_warm = False
        self.image_mib = 0

    @property
    def pool(self) -> str:
        return self.scene.model

    def close(self) -> None:
        self.manager.close()

    # --- asking ------------------------------------------------------------------------------

    async def remember(self, found: Findings) -> None:
        """Note what this process answers, twice: the second time out of the cache.

        A process is held against itself, and a copy against the process that was dumped. Two cold
        starts may choose kernels by what they measured, and differ in a word: that is only told.
        """
        before = self.reference
        if not before:
            self.prompts = [asks.words(PROMPT_WORDS, self.scene.draw) for _ in range(PROMPTS)]
        self.reference = await self.texts()
        if before:
            found.figures["answers_same_as_of_the_last_start"] = _same(before, self.reference)
        again = await self.answers()
        self.cached_tokens = again[0].cached_tokens or 0
        found.figures |= {
            "answers_same_from_the_cache": _same(self.reference, [one.text for one in again]),
            "text": self.reference[0][:60],
        }

    async def texts(self, url: str = "") -> list[str]:
        """Return the words of the answers."""
        return [answer.text for answer in await self.answers(url)]

    async def answers(self, url: str = "") -> list[Answer]:
        """Return the greedy answers to the prompts, through the proxy or of one engine."""
        asked = client(url) if url else self.scene.proxy
        try:
            return [await self._answer(asked, prompt) for prompt in self.prompts]
        finally:
            if url:
                asked.close()

    async def _answer(self, asked: Client, prompt: str) -> Answer:
        body = asks.completion(self.scene.model, prompt, ANSWER_TOKENS, stream=False)
        return await asks.ask(asked, COMPLETIONS, body)

    async def same_as_before(self, found: Findings, *, cache_kept: bool) -> None:
        """Claim that it answers as it did; and tell of, or claim, its prefix cache."""
        answers = await self.answers()
        first, texts = answers[0], [answer.text for answer in answers]
        cached = first.cached_tokens or 0
        found.figures["cached_tokens"] = f"{cached:,} of {first.prompt_tokens:,}"
        if cache_kept:
            found.claim(0 < self.cached_tokens <= cached, "its prefix cache is kept")
        found.figures["answers_same"] = _same(texts, self.reference)
        found.claim(texts == self.reference, "greedy answers are the same as before")

    async def first_answer(self) -> float:
        """Ask until it is answered; return when that was, by the loop's clock."""
        loop = asyncio.get_running_loop()
        give_up_s, said = loop.time() + PATIENCE_S, ""
        body = asks.completion(self.scene.model, "Hello", 1, stream=False)
        while loop.time() < give_up_s:
            try:
                await asks.ask(self.scene.proxy, COMPLETIONS, body, ASK_S)
            except RunError as error:
                said = str(error)
                await asyncio.sleep(POLL_S)
            else:
                return loop.time()
        raise RunError(f"no answer in {PATIENCE_S:g} s: {said}")

    # --- the manager ----------------------------------------------------------------------------

    async def wish(self, path: str) -> None:
        """Tell the manager. Raises `RunError` when it refuses, `SkipError` if it cannot."""
        try:
            async with asyncio.timeout(ASK_S):
                reader = await self.manager.post(path, b"")
        except (RequestError, TimeoutError) as error:
            raise RunError(f"the manager does not answer: {error}") from error
        said = reader.body[:300].decode("utf-8", "replace")
        if reader.status == 404:
            raise SkipError(f"this Doherty has no {path.partition('?')[0]}: {said}")
        if reader.status not in (200, 202, 204):
            raise RunError(f"the manager refuses {path}: {reader.status} {said}")

    async def seen(self, replica_id: str = "") -> Seen:
        wanted = replica_id or self.scene.stack.replica_id
        status, body = await get(self.manager, f"/v1/replicas/{wanted}")
        if status != 200:
            return Seen(phase="gone")
        return msgspec.json.decode(body, type=Seen)

    async def until(self, wanted: Sequence[str], over: Sequence[str], patience_s: float) -> Seen:
        """Wait for a phase in `wanted`. Raises `RunError` for one in `over`, or when it is late."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + patience_s
        while True:
            seen = await self.seen()
            if seen.phase in wanted:
                return seen
            if seen.phase in over or loop.time() > give_up_s:
                raise RunError(f"it is {seen.phase}, not {wanted[0]}: {seen.reason}")
            await asyncio.sleep(POLL_S)

    async def scale(self, count: int) -> None:
        await self.wish(f"/v1/pools/{self.pool}/scale?replicas={count}")

    async def replicas(self) -> list[Replica]:
        return await replicas(self.manager)

    async def held(self) -> holding.Held:
        seen = await self.seen()
        return await asyncio.to_thread(holding.held_by, seen.pid, self.scene.cards)


def _same(texts: Sequence[str], others: Sequence[str]) -> str:
    same = sum(one == other for one, other in zip(texts, others, strict=True))
    return f"{same} of {len(others)}"


async def down_and_up(ladder: Ladder, found: Findings, rung: str, name: str = "") -> float:
    """Take it down to a rung and up again; return the seconds up."""
    loop = asyncio.get_running_loop()
    prefix = f"{name}_" if name else ""
    path = f"/v1/replicas/{ladder.scene.stack.replica_id}"
    begun_s = loop.time()
    await ladder.wish(f"{path}/sleep?rung={rung}")
    seen = await ladder.until((rung,), ("ready", "backoff", "gone"), PATIENCE_S)
    found.figures[f"{prefix}down_s"] = loop.time() - begun_s
    held = await ladder.held()
    if held.gpu_mib is not None:
        found.figures[f"{prefix}gpu_mib_held"] = held.gpu_mib
        if rung == "suspended":
            before = ladder.scene.gpu_mib_before or 0
            found.claim(held.gpu_mib - before <= FREED_MIB_MAX, "the card is let go of")
    found.figures[f"{prefix}host_mib_held"] = held.host_mib
    found.figures[f"{prefix}manager_says"] = seen.reason
    begun_s = loop.time()
    await ladder.wish(f"{path}/wake")
    up_s = await ladder.first_answer() - begun_s
    found.figures[f"{prefix}up_s"] = up_s
    await ladder.until(("ready",), ("backoff", "gone"), ASK_S)
    return up_s


def compared(ladder: Ladder, found: Findings, up_s: float, share: int) -> None:
    """Claim that a way up took at most a part of a start with warm caches in this run.

    A simulator's start takes what it is told to take, so of that it is only told.
    """
    start_s = ladder.start_s
    found.figures |= {"start_s": start_s, "sooner_by": f"{start_s / up_s:.1f} x"}
    if ladder.scene.engine_name != "simulator":
        found.claim(up_s * share <= start_s, f"at most 1/{share} of a start with warm caches")


# --- steps ------------------------------------------------------------------------------------


async def with_its_cache(ladder: Ladder, found: Findings) -> None:
    """Awake, all of it moved to the host and back: its prefix cache comes along.

    The start before it is what it is held against: a later one finds the same caches, or fuller
    ones, and is held against that (`start_again`).
    """
    ups = [await down_and_up(ladder, found, "suspended", name) for name in ("first", "second")]
    await ladder.same_as_before(found, cache_kept=True)
    compared(ladder, found, min(ups), 12)


async def asleep(ladder: Ladder, found: Findings) -> None:
    """By the engine's own calls, twice: the first time touches the host's memory."""
    for name in ("first", "second"):
        await down_and_up(ladder, found, "asleep", name)
    await ladder.same_as_before(found, cache_kept=False)


async def asleep_and_suspended(ladder: Ladder, found: Findings) -> None:
    """Asleep first, so that little is left to be moved."""
    ups = [await down_and_up(ladder, found, "suspended", name) for name in ("first", "second")]
    await ladder.same_as_before(found, cache_kept=False)
    compared(ladder, found, min(ups), 30)


async def start_again(ladder: Ladder, found: Findings, *, sleep: bool, snapshot: bool) -> None:
    """A start with warm caches for certain: they were filled, or read, by the one before.

    The pool now wants to sleep, or an image, which is made before it is called ready, or both.
    """
    stack, loop = ladder.scene.stack, asyncio.get_running_loop()
    old = await ladder.seen()
    pool = stack.options.pool | ({"snapshot": True} if snapshot else {})
    await stack.reload(msgspec.structs.replace(stack.options, sleep=sleep, pool=pool))
    patience_s = stack.options.start_timeout_s
    seen = await ladder.until(("starting",), ("gone",), patience_s)
    begun_s, answered_s = loop.time(), 0.0
    while seen.phase not in ("ready", "backoff"):
        seen = await ladder.seen()
        if not answered_s and seen.pid != old.pid and await _answers(seen.url):
            answered_s = loop.time()
        if loop.time() - begun_s > patience_s:
            raise RunError(f"it is {seen.phase} after {patience_s:g} s: {seen.reason}")
        await asyncio.sleep(POLL_S)
    ended_s = loop.time()
    if seen.phase != "ready":
        raise RunError(f"it did not start: {seen.reason}")
    start_s = (answered_s or ended_s) - begun_s
    ladder.start_s = min(ladder.start_s, start_s) if ladder.start_is_warm else start_s
    ladder.start_is_warm = True
    found.figures |= {"start_s": start_s, "manager_says": seen.reason}
    if snapshot:
        await _note_image(ladder, found, ended_s - (answered_s or ended_s))
    await ladder.first_answer()
    await ladder.remember(found)


async def _note_image(ladder: Ladder, found: Findings, took_s: float) -> None:
    ladder.image_mib = await asyncio.to_thread(holding.folder_mib, _images(ladder))
    found.figures |= {"image_made_in_s": took_s, "image_mib": ladder.image_mib}
    found.claim(ladder.image_mib > 0, "there is an image of it")


def _images(ladder: Ladder) -> Path:
    return ladder.scene.stack.folder / "run" / "snapshots"


async def _answers(url: str) -> bool:
    engine = client(url)
    try:
        return (await get(engine, "/health"))[0] == 200
    finally:
        engine.close()


async def from_disk(ladder: Ladder, found: Findings, times: int) -> None:
    """No process; then one from the image, which must answer as the one that it was made of."""
    if not ladder.image_mib:
        raise SkipError("there is no image")
    loop = asyncio.get_running_loop()
    ups = []
    for number in range(times):
        await ladder.scale(0)
        await ladder.until(("gone",), (), PATIENCE_S)
        begun_s = loop.time()
        await ladder.scale(1)
        ups.append(await ladder.first_answer() - begun_s)
        found.figures[f"up_{number + 1}_s"] = ups[-1]
        seen = await ladder.until(("ready",), ("backoff",), ASK_S)
        found.figures[f"manager_says_{number + 1}"] = seen.reason
        found.claim(RESTORED in seen.reason, "it came from the image, not from a start")
    await ladder.same_as_before(found, cache_kept=False)
    held = await ladder.held()
    found.figures |= {"image_mib": ladder.image_mib, "host_mib_held": held.host_mib}
    if held.gpu_mib is not None:
        found.figures["gpu_mib_held"] = held.gpu_mib
    compared(ladder, found, statistics.median(ups), 8)


async def copies(ladder: Ladder, found: Findings, count: int) -> None:
    """Several replicas from one image at once, each on a card of its own."""
    if not ladder.image_mib:
        raise SkipError("there is no image")
    await ladder.scale(0)
    await ladder.until(("gone",), (), PATIENCE_S)
    begun_s = time.monotonic()
    await ladder.scale(count)
    try:
        ready = await _all_ready(ladder, count, begun_s)
        found.figures["all_ready_s"] = time.monotonic() - begun_s
        texts = await asyncio.gather(*(ladder.texts(replica.url) for replica in ready))
        for replica, told in zip(ready, texts, strict=True):
            reason = (await ladder.seen(replica.replica_id)).reason
            found.figures[replica.replica_id] = f"{replica.url}, {reason}"
            found.claim(RESTORED in reason, f"{replica.replica_id} came from the image")
            found.claim(told == ladder.reference, f"{replica.replica_id} answers as the first did")
        cards = await asyncio.to_thread(machine.gpus)
        own = [card for card in cards if card.index in ladder.scene.cards] or cards
        found.figures["gpu_mib_held"] = ", ".join(f"{card.used_mib:,}" for card in own)
        urls = {replica.url for replica in ready}
        found.claim(len(urls) == count, "each has an address of its own")
    finally:
        await ladder.scale(1)


async def _all_ready(ladder: Ladder, count: int, begun_s: float) -> list[Replica]:
    """Wait for so many replicas. Raises `RunError` with what became of them."""
    while True:
        known = await ladder.replicas()
        ready = [replica for replica in known if replica.state == "ready"]
        if len(ready) >= count:
            return ready
        if time.monotonic() - begun_s > COPIES_S_MAX:
            told = "; ".join(f"{r.replica_id} {r.state} {r.reason}" for r in known)
            raise RunError(f"not {count} copies in {COPIES_S_MAX:g} s: {told}")
        await asyncio.sleep(POLL_S)
