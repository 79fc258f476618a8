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
from loadtest.gpu.gauges import EngineLoad, proxy_series, total
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


class Watch:
    """Readings of one engine from before a request on: has it been busy, is it idle again?

    Engines tell of a step when it ends, so that for a fraction of a second a request is not seen
    yet; idle counts only after it was seen. A prompt that SGLang computes piece by piece is neither
    running nor waiting there, and shows by the KV memory that it holds.
    """

    def __init__(self, scene: Scene, before: EngineLoad) -> None:
        self._gauge = scene.gauge
        self._before = before
        self.seen_busy = False

    async def busy(self) -> bool:
        """Read once more."""
        load = await self._gauge.read()
        more = load.kv_used_ratio - self._before.kv_used_ratio
        busy = load.requests > 0 or more > KV_REST_RATIO
        self.seen_busy = self.seen_busy or busy
        return busy


async def _leave(scene: Scene, body: bytes, after_s: float) -> float:
    """Ask, leave (after some time, or once the stream runs), and return the time to idle."""
    before = await scene.gauge.read()
    if before.requests:
        raise RunError(f"the engine is not idle: {before.requests} requests")
    watch, reader, loop = Watch(scene, before), AnswerReader(), asyncio.get_running_loop()
    asked = asyncio.ensure_future(scene.proxy.post(COMPLETIONS, body, reader=reader))
    try:
        if after_s:
            await asyncio.sleep(after_s)
            await _until_busy(watch, asked)
        else:
            await _until_streamed(watch, reader, asked)
        if asked.done():
            await asked
            raise RunError("the answer was whole before its client could leave")
    finally:
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError, RequestError):
            await asked
    left_s = loop.time()
    while await watch.busy() or not watch.seen_busy:
        if loop.time() - left_s > IDLE_PATIENCE_S:
            how = "busy" if watch.seen_busy else "never seen busy"
            raise RunError(f"{IDLE_PATIENCE_S:g} s after its client left the engine is {how}")
        await asyncio.sleep(POLL_S)
    return loop.time() - left_s


async def _until_busy(watch: Watch, asked: asyncio.Future[AnswerReader]) -> None:
    """Wait until the engine tells of the prompt: vLLM does so once a first piece is computed.

    A client that left earlier would leave nothing to be seen: the engine drops the request at the
    end of the same step that would have told of it.
    """
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    while not await watch.busy() and not asked.done():
        if loop.time() - begun_s > BUSY_PATIENCE_S:
            raise RunError("the engine was not seen busy with the prompt")
        await asyncio.sleep(POLL_S)


async def _until_streamed(
    watch: Watch, reader: AnswerReader, asked: asyncio.Future[AnswerReader]
) -> None:
    """Wait until a stream has come some way, and the engine is seen busy with it."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    while reader.content_events < EVENTS_BEFORE or not watch.seen_busy:
        if asked.done():
            return
        if loop.time() - begun_s > BUSY_PATIENCE_S:
            raise RunError("the stream did not begin, or the engine was not seen busy with it")
        await watch.busy()
        await asyncio.sleep(POLL_S)
