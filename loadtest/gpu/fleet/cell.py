"""One cell: caches emptied, a router started, a trace replayed at its own times, all of it noted.

Every arm of a group gets the same bytes at the same times. Which requests those are does not
depend on any answer. A request that has no whole answer some time after the last one was sent has
failed: at 1.1 of the capacity waiting longer would only measure patience.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import orjson

from loadtest.client import Client, RequestError, parse_url
from loadtest.gpu import machine
from loadtest.gpu.direct import MODEL
from loadtest.gpu.fleet import events, lab, plan, rivals
from loadtest.gpu.fleet.engines import Fleet, spent
from loadtest.gpu.fleet.load import within
from loadtest.gpu.fleet.record import DIGITS, Capacity, CellKey, CellRecord, Row, Tokens
from loadtest.measure import Outcome
from loadtest.prompts import PromptWriter, Style
from loadtest.run import Options, Run, RunError, run_replay
from loadtest.traces import Arrival, Trace
from loadtest.words import WORDS

WARM_SHARE = 0.2  # of a cell's seconds, before anything is measured
PATIENCE_S = 40.0  # for an answer
SETTLE_SHARE = 1 / 3  # of a capacity's seconds: prompts come in step at first, engines are cold
SLICES = 4  # of what is counted, each told: a drift is seen
WORDS_ASKED = 1024
LENGTH_OFF_MAX = 0.03  # of a prompt, as the engine counts it


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what cells are run."""

    fleet: Fleet
    programs: rivals.Programs
    folder: Path
    seconds: float
    say: Callable[[str], None]

    def folder_of(self, key: CellKey) -> Path:
        """Make and return the folder of a cell's router."""
        folder = self.folder / key.text.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


async def run_cell(key: CellKey, trace: Trace, scale: float, place: Place) -> CellRecord:
    """Return what came of it, a failure included; only what no cell survives is raised."""
    warm_s = WARM_SHARE * place.seconds
    record = CellRecord(
        key=key,
        began=machine.today(),
        scale=round(scale, 4),
        seconds=place.seconds,
        warm_s=warm_s,
        rows=[],
        engines=[],
    )
    try:
        await place.fleet.flush()
        folder = place.folder_of(key)
        async with rivals.running(key.arm, place.fleet.urls, folder, place.programs) as router:
            return await _replayed(record, trace, router, place)
    except RunError as error:
        return msgspec.structs.replace(record, failure=str(error)[:2000])


async def _replayed(
    record: CellRecord, trace: Trace, router: rivals.Running, place: Place
) -> CellRecord:
    key = record.key
    options = Options(
        trace=trace.source,
        url=router.url,
        model=MODEL,
        api="completions",
        speed=record.scale,
        timeout=PATIENCE_S,
        session_header=key.arm == plan.VLLM,
        seed=key.repeat,
        warmup="0",
        label=key.text,
        quiet=True,
    )
    told: dict[str, float] = {}
    before, (cpu_s, _) = await place.fleet.tokens(), router.used()
    async with asyncio.TaskGroup() as group:
        happening = group.create_task(events.happen(key.event, router, place, told))
        run = await run_replay(within(trace, record.scale, record.seconds), options)
        happening.cancel()
    after, (cpu_after_s, mib) = await place.fleet.tokens(), router.used()
    if run.interrupted:
        raise KeyboardInterrupt
    if (by_events := await router.by_events()) is not None:
        told["replicas_by_events"] = by_events
    return msgspec.structs.replace(
        record,
        rows=[row_of(outcome) for outcome in run.outcomes],
        engines=spent(before, after),
        router_s=round(cpu_after_s - cpu_s, 3),
        router_start_s=round(cpu_s, 3),
        router_mib=round(mib, 1),
        client_cpu_share=round(run.summary.client_cpu_share or 0.0, 3),
        lateness_p99_s=round(run.summary.lateness_p99_s or 0.0, DIGITS),
        told=told,
        failure=_failure(run),
    )


def _failure(run: Run) -> str:
    good = sum(not outcome.error for outcome in run.outcomes)
    if good:
        return ""
    return f"no request succeeded: {run.summary.errors}, such as {run.summary.error_example}"


def row_of(outcome: Outcome) -> Row:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, DIGITS)

    return Row(
        at_s=round(outcome.scheduled_s, 4),
        ttft_s=rounded(outcome.ttft_s),
        tpot_s=rounded(outcome.tpot_s),
        total_s=round(outcome.ended_s - outcome.sent_s, DIGITS),
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens or 0,
        output_tokens=outcome.output_tokens,
        error=outcome.error,
    )


# --- capacity -----------------------------------------------------------------------------------


async def capacity(
    shape: str, workload: str, trace: Trace, place: Place, seconds: float
) -> Capacity:
    """Measure what the replicas compute when each always has requests waiting.

    Round robin without a router: the requests of the trace in their order, so many under way on
    each. Raises `RunError` when nothing was computed, and where prompts are not as long as the
    trace says: a load would mean something else.
    """
    await check_length(place.fleet.urls[0])
    await place.fleet.flush()
    urls = place.fleet.urls
    lines: list[list[Arrival]] = [list(trace.arrivals[at :: len(urls)]) for at in range(len(urls))]
    writer = PromptWriter(Style(model=MODEL, api="completions", seed=999), trace.block_tokens)
    begun_s, done = time.monotonic(), [0]
    clients = [Client(parse_url(url), time.monotonic) for url in urls]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_saturate(client, line, writer, done))
                for client, line in zip(clients, map(iter, lines), strict=True)
                for _ in range(lab.AT_ONCE)
            ]
            await asyncio.sleep(SETTLE_SHARE * seconds)
            count, seen = done[0], [await _counted(place, begun_s)]
            for _ in range(SLICES):
                await asyncio.sleep(seconds * (1 - SETTLE_SHARE) / SLICES)
                seen.append(await _counted(place, begun_s))
            requests = done[0] - count
            for task in tasks:
                task.cancel()
    finally:
        for client in clients:
            client.close()
    slices = [_rate(*pair) for pair in itertools.pairwise(seen)]
    rate = _rate(seen[0], seen[-1])
    if rate <= 0:
        raise RunError("no engine computed anything; see their logs")
    each = ", ".join(f"{one:,.0f}" for one in slices)
    place.say(f"capacity of {workload}: {rate:,.0f} uncached tokens/s a replica ({each})")
    return Capacity(
        shape=shape,
        workload=workload,
        uncached_tokens_per_s=round(rate, 1),
        slices=[round(one, 1) for one in slices],
        requests=requests,
        settled_s=round(seen[0].at_s, 2),
        seconds=round(seen[-1].at_s - seen[0].at_s, 2),
        engines=spent(seen[0].tokens, seen[-1].tokens),
    )


class _Counted(NamedTuple):
    """What the engines had counted, and when."""

    at_s: float
    tokens: list[Tokens]


async def _counted(place: Place, begun_s: float) -> _Counted:
    tokens = await place.fleet.tokens()
    return _Counted(time.monotonic() - begun_s, tokens)


def _rate(before: _Counted, after: _Counted) -> float:
    """Return the uncached tokens a second of one replica."""
    engines = spent(before.tokens, after.tokens)
    return sum(one.work for one in engines) / len(engines) / (after.at_s - before.at_s)


async def check_length(url: str) -> None:
    """Have an engine count the words of a prompt. Raises `RunError`."""
    words = itertools.islice(itertools.cycle(WORDS), WORDS_ASKED)
    body = {"model": MODEL, "prompt": "".join(f" {word}" for word in words), "max_tokens": 1}
    client = Client(parse_url(url), time.monotonic)
    with contextlib.closing(client):
        try:
            answer = await client.post("/v1/completions", orjson.dumps(body))
            counted = orjson.loads(answer.body)["usage"]["prompt_tokens"]
        except (RequestError, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise RunError(f"{url}: does not count a prompt's tokens: {error!r}") from error
    if abs(counted - WORDS_ASKED) > LENGTH_OFF_MAX * WORDS_ASKED:
        raise RunError(
            f"{url}: counts {counted} tokens in {WORDS_ASKED} words, so loads would not mean what "
            "they say; use a model whose tokenizer has each word as one token, as those of "
            "deploy/airgap/make_model.py"
        )


async def _saturate(
    client: Client, line: Iterator[Arrival], writer: PromptWriter, done: list[int]
) -> None:
    """Send the line's requests one after the other; others take from the same line."""
    for arrival in line:
        with contextlib.suppress(RequestError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await client.post("/v1/completions", writer.body(arrival))
                done[0] += 1
