"""Step: SIGTERM while a stream runs: the stream completes, and nothing is left behind."""

from __future__ import annotations

import asyncio

from loadtest.gpu import asks
from loadtest.gpu.asks import COMPLETIONS
from loadtest.gpu.scene import Scene
from loadtest.gpu.stack import carriers
from loadtest.gpu.steps import Findings, SkipError
from loadtest.run import RunError
from loadtest.wire import AnswerReader

EVENTS_BEFORE = 5
POLL_S = 0.02
PATIENCE_S = 10.0
BEGIN_S_MAX = 60.0  # the model may have to come back to the card first
STREAM_TOKENS_MAX = 1000
GPU_MIB_SLACK = 64  # what the driver itself may keep or give back meanwhile
SHOWN = 4


async def drain_and_stop(scene: Scene, found: Findings) -> None:
    """The whole end of `doherty up`."""
    process = scene.stack.process
    if process is None:
        raise SkipError("nothing was started")
    if process.returncode is None and scene.begun:
        await _drain(scene, found)
    else:
        await scene.stack.stop()
    left = await _left(scene)
    found.figures["processes_left"] = len(left)
    for pid, command in list(left.items())[:SHOWN]:
        found.claim(False, f"process {pid} is left: {command[:100]}")
    await _memory(scene, found)


async def _drain(scene: Scene, found: Findings) -> None:
    tokens = min(STREAM_TOKENS_MAX, scene.measure.stream_tokens // 2)
    body = asks.completion(scene.model, asks.ids(100, scene.draw), tokens)
    reader = AnswerReader()
    asked = asyncio.ensure_future(scene.proxy.post(COMPLETIONS, body, reader=reader))
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    while reader.content_events < EVENTS_BEFORE:
        if asked.done() or loop.time() - begun_s > BEGIN_S_MAX:
            asked.cancel()
            raise RunError("the stream did not begin")
        await asyncio.sleep(POLL_S)
    signalled_s, events_before = loop.time(), reader.content_events
    stopping = asyncio.ensure_future(scene.stack.stop())
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            await asked
        found.figures["stream_went_on_s"] = loop.time() - signalled_s
    finally:
        status = await stopping
        found.figures["stopped_after_s"] = loop.time() - signalled_s
    found.figures |= {
        "tokens_at_signal": events_before,
        "tokens": int((reader.usage or {}).get("completion_tokens") or 0),
        "status_of_up": status,
    }
    whole = reader.done_seen and found.figures["tokens"] == tokens
    found.claim(whole, f"the stream that ran came whole, {tokens} tokens and its end")
    found.claim(status == 0, "`doherty up` ended with 0")


async def _left(scene: Scene) -> dict[int, str]:
    """Return the processes that are left; those just ending get a moment."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + PATIENCE_S / 2
    while True:
        left = carriers(scene.stack.mark)
        if not left or loop.time() > deadline_s:
            return left
        await asyncio.sleep(POLL_S)


async def _memory(scene: Scene, found: Findings) -> None:
    before_mib = scene.gpu_mib_before
    if before_mib is None:
        return
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + PATIENCE_S
    while True:
        now_mib = await scene.used_mib()
        if now_mib is None or now_mib <= before_mib + GPU_MIB_SLACK or loop.time() > deadline_s:
            break
        await asyncio.sleep(POLL_S)
    found.figures |= {"gpu_mib_before": before_mib, "gpu_mib_after": now_mib}
    found.claim(
        now_mib is not None and now_mib <= before_mib + GPU_MIB_SLACK, "GPU memory was given back"
    )
