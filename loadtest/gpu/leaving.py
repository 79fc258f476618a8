"""Steps: a client goes away, and the engine stops its work.

The client closes its connection to the proxy while its prompt is computed, and while its answer is
streamed. From that moment the engine itself is asked, without pause, how busy it is; what is told
is the time until it is as idle as before. One reading takes some milliseconds (an engine answers
between its steps), and the times are no finer than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics

from loadtest.client import RequestError
from loadtest.gpu import asks
from loadtest.gpu.asks import COMPLETIONS
from loadtest.gpu.gauges import proxy_series, total
from loadtest.gpu.scene import Scene
from loadtest.gpu.steps import Findings
from loadtest.run import RunError
from loadtest.wire import AnswerReader

PROMPT_TOKENS = 200  # of the streams that are left
POLL_S = 0.01
BUSY_PATIENCE_S = 5.0
IDLE_PATIENCE_S = 20.0
IDLE_S_MAX = 1.0  # after a stream was left, of which seconds were to come
KV_REST_RATIO = 0.002  # engines keep a block or two for themselves
EVENTS_BEFORE = 5  # of a stream, before its client leaves


async def mid_prefill(scene: Scene, found: Findings) -> None:
    """The client leaves while its long prompt is computed."""
    tokens = scene.measure.long_tokens
    whole = await asks.ask(scene.proxy, COMPLETIONS, _asked(scene, tokens, 1))
    left_s = whole.first_s - scene.measure.leave_after_s
    found.figures |= {"prompt_tokens": tokens, "undisturbed_first_token_s": whole.first_s}
    if left_s <= 0:
        raise RunError(f"{tokens} tokens take {whole.first_s:.3f} s, too short to leave within")
    times = [
        await _leave(scene, _asked(scene, tokens, 1), scene.measure.leave_after_s)
        for _ in range(scene.measure.leaves)
    ]
    await _told(scene, found, times)
    median_s = statistics.median(times)
    found.figures["it_would_have_taken_s"] = left_s
    found.claim(median_s < left_s, "the engine was idle before it would have been done")


async def mid_stream(scene: Scene, found: Findings) -> None:
    """The client leaves while its answer is streamed."""
    tokens = scene.measure.stream_tokens
    times = [
        await _leave(scene, _asked(scene, 200, tokens), 0.0) for _ in range(scene.measure.leaves)
    ]
    await _told(scene, found, times)
    found.figures["answer_tokens"] = tokens
    found.claim(
        statistics.median(times) < IDLE_S_MAX, f"the engine was idle within {IDLE_S_MAX:g} s"
    )


def _asked(scene: Scene, prompt_tokens: int, tokens: int) -> bytes:
    return asks.completion(scene.model, asks.ids(prompt_tokens, scene.draw), tokens)


async def _told(scene: Scene, found: Findings, times: list[float]) -> None:
    found.figures |= {
        "repeats": len(times),
        "idle_after_median_s": statistics.median(times),
        "idle_after_max_s": max(times),
    }
    gone = total(await proxy_series(scene.admin), "doherty_cancellations_total")
    found.figures["cancellations_counted"] = int(gone)
    found.claim(gone >= len(times), "the proxy counted the clients that left")


async def _leave(scene: Scene, body: bytes, after_s: float) -> float:
    """Ask, leave (after some time, or once the stream runs), and return the time to idle."""
    before = await scene.gauge.read()
    if before.requests:
        raise RunError(f"the engine is not idle: {before.requests} requests")
    reader = AnswerReader()
    asked = asyncio.ensure_future(scene.proxy.post(COMPLETIONS, body, reader=reader))
    loop = asyncio.get_running_loop()
    begun_s, busy = loop.time(), False
    try:
        while not busy or loop.time() - begun_s < after_s or not _running(reader, after_s):
            if asked.done():
                await asked
                raise RunError("the answer was whole before its client could leave")
            if loop.time() - begun_s > BUSY_PATIENCE_S:
                raise RunError("the engine was never seen busy with the request")
            busy = busy or (await scene.gauge.read()).requests > 0
            await asyncio.sleep(POLL_S if busy else 0)
    finally:
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError, RequestError):
            await asked
    left_s = loop.time()
    while True:
        load = await scene.gauge.read()
        if not load.requests and load.kv_used_ratio <= before.kv_used_ratio + KV_REST_RATIO:
            return loop.time() - left_s
        if loop.time() - left_s > IDLE_PATIENCE_S:
            raise RunError(
                f"{load.requests} requests run {IDLE_PATIENCE_S:g} s after they were left"
            )
        await asyncio.sleep(POLL_S)


def _running(reader: AnswerReader, after_s: float) -> bool:
    """Return whether a stream has come so far that it is left; a prefill is left by time."""
    return bool(after_s) or reader.content_events >= EVENTS_BEFORE
