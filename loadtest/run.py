"""One replay as a command runs it: find the model, send, show progress, sum up.

The trace is kept out of the garbage collector's sight while requests are under way: a full pass
over a long one would take longer than the times that are measured.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import deque
from typing import Any, Protocol

import msgspec

from loadtest.client import Client, RequestError, parse_url
from loadtest.formats import read_trace
from loadtest.measure import Outcome, Summary, quantile, summarise, warmup_count
from loadtest.prompts import Api, PromptWriter, Style
from loadtest.replay import Pacing, Replay, WallClock, judge
from loadtest.traces import Selection, Trace, in_sending_order, reusable_share, select

PREFLIGHT_TIMEOUT_S = 10.0
PROGRESS_INTERVAL_S = 0.5
RECENT_TTFTS = 500  # the progress bar's median is of the last ones


class RunError(Exception):
    """The replay cannot begin; the text says why and what to do."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says about a replay."""

    trace: str = "conversation"
    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api: Api = "chat"
    speed: float = 1.0
    users: int = 16
    limit: int = 0
    offset: int = 0
    duration: float = 0.0
    max_input_tokens: int = 0
    max_output_tokens: int = 0
    output_tokens_scale: float = 1.0
    think_max: float = 120.0
    api_key: str | None = None
    timeout: float = 600.0
    concurrency_max: int = 4096
    session_header: bool = False
    seed: int = 0
    bytes_per_token: int = 4
    ignore_eos: bool = True
    warmup: str = "10%"
    label: str | None = None
    quiet: bool = False

    def selection(self) -> Selection:
        return Selection(
            offset=self.offset,
            limit=self.limit,
            duration_s=self.duration,
            speed=self.speed,
            users=self.users,
            input_tokens_max=self.max_input_tokens,
            output_tokens_max=self.max_output_tokens,
            output_tokens_scale=self.output_tokens_scale,
            think_s_max=self.think_max,
        )

    def pacing(self) -> Pacing:
        return Pacing(
            speed=self.speed,
            users=self.users,
            duration_s=self.duration,
            timeout_s=self.timeout,
            concurrency_max=self.concurrency_max,
            session_header=self.session_header,
        )

    def shown(self) -> dict[str, Any]:
        """Return all settings, as they go into reports: no key, nor a password in the URL."""
        settings = msgspec.structs.asdict(self)
        settings["api_key"] = "***" if self.api_key else None
        scheme, _, rest = self.url.partition("://")
        settings["url"] = f"{scheme}://{rest.rpartition('@')[2]}"
        return settings


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A replay that was made."""

    label: str
    settings: dict[str, Any]
    model: str
    request_count: int  # that the trace holds for this replay
    interrupted: bool
    outcomes: tuple[Outcome, ...]
    summary: Summary
    left: dict[str, float] = {}  # what the proxy still held at the end, by gauge; where one looked


class Progress(Protocol):
    """Somebody who is told how it goes."""

    def show(self, sent: int, done: int, errors: int, ttft_p50_s: float | None) -> None: ...

    def close(self) -> None: ...


class NoProgress:
    """Tells nobody."""

    def show(self, sent: int, done: int, errors: int, ttft_p50_s: float | None) -> None:
        pass

    def close(self) -> None:
        pass


class BarProgress:
    """A progress bar on standard error."""

    def __init__(self, total: int, label: str) -> None:
        from tqdm import tqdm  # noqa: PLC0415 - an extra; `make_progress` says so where it is missing

        self._bar: tqdm[Any] = tqdm(total=total, desc=label, unit="req", smoothing=0.1)

    def show(self, sent: int, done: int, errors: int, ttft_p50_s: float | None) -> None:
        ttft = "-" if ttft_p50_s is None else f"{1000 * ttft_p50_s:.0f} ms"
        self._bar.set_postfix_str(f"sent {sent}, errors {errors}, TTFT p50 {ttft}", refresh=False)
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def make_progress(total: int, label: str, *, quiet: bool) -> Progress:
    """Return a progress bar where there is a terminal and the package for it."""
    if quiet or not sys.stderr.isatty():
        return NoProgress()
    try:
        return BarProgress(total, label)
    except ImportError:
        print("no progress bar: pip install 'doherty[loadtest]' for it", file=sys.stderr)
        return NoProgress()


def load_trace(options: Options) -> Trace:
    """Return the requests that `options` choose. Raises `TraceError`."""
    return select(read_trace(options.trace), options.selection())


async def run_replay(trace: Trace, options: Options, *, replica_count: int = 0) -> Run:
    """Replay `trace`, already selected, and sum it up. Ctrl-C ends it early.

    Raises `RunError` when the server cannot be reached or names no model.
    """
    warmup_requests = warmup_count(options.warmup, trace.request_count)
    clock = WallClock()
    client = Client(parse_url(options.url), clock.now_s, api_key=options.api_key)
    try:
        model = await find_model(client, options)
        if note := too_long(trace, model):
            print(f"loadtest: {note}", file=sys.stderr)
        style = Style(
            model=model.id,
            api=options.api,
            bytes_per_token=options.bytes_per_token,
            seed=options.seed,
            ignore_eos=options.ignore_eos,
        )
        replay = Replay(
            client.post, PromptWriter(style, trace.block_tokens), options.pacing(), clock
        )
        label = options.label or options.trace
        progress = make_progress(trace.request_count, label, quiet=options.quiet)
        cpu_s, began_s = time.process_time(), clock.now_s()
        interrupted = await _send_all(replay, trace, progress)
        cpu_share = (time.process_time() - cpu_s) / max(1e-9, clock.now_s() - began_s)
    finally:
        client.close()
        await asyncio.sleep(0)  # connections close in the loop's next round
    summary = summarise(
        replay.outcomes,
        warmup_requests,
        hit_rate_bound=_bound(replay, warmup_requests),
        replica_count=replica_count,
    )
    return Run(
        label=label,
        settings=options.shown(),
        model=model.id,
        request_count=trace.request_count,
        interrupted=interrupted,
        outcomes=tuple(sorted(replay.outcomes, key=lambda o: o.index)),
        summary=msgspec.structs.replace(summary, client_cpu_share=cpu_share),
    )


class Model(msgspec.Struct, frozen=True):
    """What a server says of a model that it serves."""

    id: str
    max_model_len: int | None = None  # vLLM's and SGLang's word: prompt and answer together


class _Models(msgspec.Struct):
    data: list[Model]


async def find_model(client: Client, options: Options) -> Model:
    """Return the model to ask for: the one named, or the first that the server serves."""
    try:
        async with asyncio.timeout(PREFLIGHT_TIMEOUT_S):
            answer = await client.get("/v1/models")
    except RequestError as error:
        raise RunError(f"{options.url}: {error.detail}; is the server running?") from error
    except TimeoutError as error:
        raise RunError(f"{options.url}: no answer in {PREFLIGHT_TIMEOUT_S:g} s") from error
    problem = ": ".join(judge(answer)) if answer.status != 200 else "names no model"
    models: list[Model] = []
    if answer.status == 200:
        try:
            models = msgspec.json.decode(answer.body, type=_Models).data
        except msgspec.DecodeError as error:
            problem = str(error)
    if options.model is not None:
        return next((m for m in models if m.id == options.model), Model(options.model))
    if not models:
        raise RunError(f"{options.url}/v1/models: {problem}; is a replica up? or give --model")
    return models[0]


def too_long(trace: Trace, model: Model) -> str | None:
    """Return a warning when the model's context is too short for some requests."""
    if model.max_model_len is None:
        return None
    lengths = [a.input_tokens + a.output_tokens for a in in_sending_order(trace)]
    count = sum(length > model.max_model_len for length in lengths)
    if not count:
        return None
    return (
        f"{count:,} of {len(lengths):,} requests do not fit the {model.max_model_len:,} tokens "
        f"of {model.id}; --max-input-tokens leaves long prompts out"
    )


def _bound(replay: Replay, warmup_requests: int) -> float | None:
    """Return the best hit rate of the requests that were answered: the others filled no cache."""
    answered = sorted(o.index for o in replay.outcomes if not o.error)
    skip_count = sum(index < warmup_requests for index in answered)
    return reusable_share((replay.sent[index] for index in answered), skip_count)


async def _send_all(replay: Replay, trace: Trace, progress: Progress) -> bool:
    """Run the replay with its progress shown. Returns whether Ctrl-C ended it.

    Ctrl-C cancels the main task (`asyncio.Runner`). It is taken here as the wish to see what was
    measured so far; a second one raises `KeyboardInterrupt`.
    """
    interrupted = False
    gc.collect()
    gc.freeze()
    try:
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(replay.run(trace), name="replay")
            showing = tasks.create_task(_show_progress(replay, progress), name="progress")
            try:
                await asyncio.wait([sending])
            except asyncio.CancelledError:
                interrupted = True
                if (main := asyncio.current_task()) is not None:
                    main.uncancel()
                sending.cancel()
                await asyncio.wait([sending])
            showing.cancel()
    finally:
        gc.unfreeze()
        progress.close()
    return interrupted


async def _show_progress(replay: Replay, progress: Progress) -> None:
    seen = errors = 0
    ttfts_s: deque[float] = deque(maxlen=RECENT_TTFTS)
    try:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            seen, errors = _show(replay, progress, ttfts_s, seen, errors)
    finally:
        _show(replay, progress, ttfts_s, seen, errors)


def _show(
    replay: Replay, progress: Progress, ttfts_s: deque[float], seen: int, errors: int
) -> tuple[int, int]:
    for outcome in replay.outcomes[seen:]:
        errors += bool(outcome.error)
        if not outcome.error and outcome.ttft_s is not None:
            ttfts_s.append(outcome.ttft_s)
    progress.show(len(replay.sent), len(replay.outcomes), errors, quantile(ttfts_s, 0.5))
    return len(replay.outcomes), errors


def complaint(outcomes: tuple[Outcome, ...], url: str) -> str | None:
    """Return one line when every request failed, with the commonest reason; else None."""
    if not outcomes or any(not o.error for o in outcomes):
        return None
    summary = summarise(outcomes, 0)
    counts = ", ".join(f"{count} x {kind}" for kind, count in summary.errors.items())
    example = f" ({summary.error_example})" if summary.error_example else ""
    return f"{url}: every request failed: {counts}{example}"
