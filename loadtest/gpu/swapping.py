"""Two models on one card, swapped under load: requests wait, and none fails.

Both pools are scaled by demand, from none to one replica; the card has room for one. Each round
asks the model that is not there, while the other still streams: so the manager has to let the
streams end, move the one out of the card, and bring the other in, while the proxy holds what came.
"""

from __future__ import annotations

import asyncio
import statistics

import msgspec

from loadtest.fleet import get
from loadtest.gpu import asks
from loadtest.gpu.asks import COMPLETIONS
from loadtest.gpu.rungs import Ladder
from loadtest.gpu.steps import Findings, SkipError
from loadtest.run import RunError

OTHER = "other"
STREAMS, STREAM_TOKENS = 3, 200
ASKERS, ASK_TOKENS = 6, 8
ASK_S = 120.0
LISTED_S_MAX = 10.0
AUTOSCALE = {
    "min": 0,
    "max": 1,
    "scaledown_window_secs": 1.0,
    "rungs": ["asleep", "suspended"],
}
TARGET_INPUTS = 64


async def second_model(ladder: Ladder, found: Findings, cards: int) -> None:
    """The first requests of a model that has no process yet: it is started for them."""
    if cards != 1:
        raise SkipError(f"{cards} cards have room for both; name one by --gpus")
    stack, loop = ladder.scene.stack, asyncio.get_running_loop()
    pool = {name: value for name, value in stack.options.pool.items() if name != "snapshot"}
    pool |= {"autoscale": AUTOSCALE, "target_inputs": TARGET_INPUTS, "gpus": 1}
    options = msgspec.structs.replace(stack.options, sleep=True, pool=pool, others=(OTHER,))
    await stack.reload(options)
    await _listed(ladder, OTHER)
    begun_s = loop.time()
    for model in (ladder.scene.model, OTHER):
        await _ask(ladder, model, ASK_TOKENS, stack.options.start_timeout_s)
        found.figures[f"{model}_answered_after_s"] = loop.time() - begun_s


async def _listed(ladder: Ladder, model: str) -> None:
    """Wait until the proxy knows a model. Raises `RunError`."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + LISTED_S_MAX
    while model.encode() not in (await get(ladder.scene.proxy, "/v1/models"))[1]:
        if loop.time() > give_up_s:
            raise RunError(f"{LISTED_S_MAX:g} s after a reload the proxy knows no '{model}'")
        await asyncio.sleep(0.05)


async def swap(ladder: Ladder, found: Findings, rounds: int) -> None:
    """Ask one, then the other, `rounds` times."""
    loop = asyncio.get_running_loop()
    models, waits, failed, asked = (ladder.scene.model, OTHER), [], list[str](), 0
    before = await _restarts(ladder)  # the reload that brought the second model was one
    for number in range(rounds):
        there, wanted = models[(number + 1) % 2], models[number % 2]
        streams = [
            asyncio.ensure_future(_ask(ladder, there, STREAM_TOKENS, ASK_S)) for _ in range(STREAMS)
        ]
        await asyncio.sleep(0.1)
        begun_s = loop.time()
        askers = [
            asyncio.ensure_future(_ask(ladder, wanted, ASK_TOKENS, ASK_S)) for _ in range(ASKERS)
        ]
        results = await asyncio.gather(*streams, *askers, return_exceptions=True)
        waits.append(loop.time() - begun_s)
        failed += [str(result) for result in results if isinstance(result, BaseException)]
        asked += len(results)
    found.figures |= {
        "rounds": rounds,
        "requests": asked,
        "failed": len(failed),
        "round_median_s": statistics.median(waits),
        "round_longest_s": max(waits),
    }
    found.claim(not failed, f"no request failed: {failed[0] if failed else ''}")
    found.claim(await _restarts(ladder) == before, "no engine was started anew")


async def _restarts(ladder: Ladder) -> int:
    return sum(replica.restarts for replica in await ladder.replicas())


async def _ask(ladder: Ladder, model: str, tokens: int, timeout_s: float) -> None:
    """Ask through the proxy. Raises `RunError` for anything but a whole answer."""
    prompt = asks.words(50, ladder.scene.draw)
    body = asks.completion(model, prompt, tokens, stream=tokens > ASK_TOKENS)
    answer = await asks.ask(ladder.scene.proxy, COMPLETIONS, body, timeout_s)
    if answer.completion_tokens != tokens:
        raise RunError(f"{model}: {answer.completion_tokens} tokens, not {tokens}")
