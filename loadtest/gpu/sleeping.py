"""Step: the engine is put to sleep and woken by the manager, and answers as before.

Greedy answers are compared word by word: weights that did not come back whole would show. They are
compared with answers to prompts that were not cached, because a wakened cache is empty, and because
a prompt out of the cache goes through other sums, whose rounding may choose another word (how often
is told, not judged). The operator's own commands are used (`doherty sleep`, `doherty wake`).
"""

from __future__ import annotations

import asyncio

from loadtest.gpu import asks
from loadtest.gpu.asks import COMPLETIONS
from loadtest.gpu.scene import Scene
from loadtest.gpu.steps import Findings, SkipError
from loadtest.run import RunError

PROMPTS, PROMPT_WORDS, ANSWER_TOKENS = 4, 300, 32
POLL_S = 0.05
PATIENCE_S = 60.0
REFUSED_WITHIN_S = 1.0  # how long a request is tried against an engine that sleeps
UNKNOWN_COMMAND_STATUS = 2


async def sleep_and_wake(scene: Scene, found: Findings) -> None:
    """Twice: the first sleep touches host memory that the second finds ready."""
    if not scene.stack.options.sleep:
        raise SkipError("the engine was started without sleep mode: --no-sleep")
    prompts = [asks.words(PROMPT_WORDS, scene.draw) for _ in range(PROMPTS)]
    before = [await _greedy(scene, prompt) for prompt in prompts]
    again = [await _greedy(scene, prompt) for prompt in prompts]
    same = sum(one == other for one, other in zip(before, again, strict=True))
    found.figures["answers_same_from_the_cache"] = f"{same} of {len(prompts)}"
    found.figures["gpu_mib_awake"] = await scene.used_mib()
    for name in ("first", "second"):
        found.figures[f"{name}_sleep_s"] = await _until(scene, "sleep", asleep=True)
        found.figures[f"{name}_gpu_mib_asleep"] = await scene.used_mib()
        if name == "first":
            found.figures["asked_while_asleep"] = await _refusal(scene)
        found.figures[f"{name}_wake_s"] = await _until(scene, "wake", asleep=False)
        after = [await _greedy(scene, prompt) for prompt in prompts]
        found.claim(after == before, f"greedy answers are the same after the {name} sleep")
    found.figures |= {"answers_compared": 2 * PROMPTS, "text": before[0][:60]}
    awake, asleep = (found.figures[name] for name in ("gpu_mib_awake", "first_gpu_mib_asleep"))
    if isinstance(awake, int) and isinstance(asleep, int):
        found.claim(asleep < awake / 2, "asleep it holds less than half of its GPU memory")


async def _greedy(scene: Scene, prompt: str) -> str:
    body = asks.completion(scene.model, prompt, ANSWER_TOKENS, stream=False)
    return (await asks.ask(scene.proxy, COMPLETIONS, body)).text


async def _until(scene: Scene, wish: str, *, asleep: bool) -> float:
    """Tell the manager, wait until it says that it is so; return the seconds."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    status, _, said = await scene.stack.run(
        wish, scene.stack.replica_id, "--manager-url", scene.stack.manager_url
    )
    if status == UNKNOWN_COMMAND_STATUS and "invalid choice" in said:
        raise SkipError(f"this Doherty has no command '{wish}'")
    if status:
        raise RunError(f"`doherty {wish}` ended with {status}: {said.strip()}")
    while True:
        replica = await scene.stack.replica()
        if (replica.asleep or replica.state == "asleep") == asleep and (
            asleep or replica.state == "ready"
        ):
            return loop.time() - begun_s
        if loop.time() - begun_s > PATIENCE_S:
            raise RunError(f"{PATIENCE_S:g} s after `doherty {wish}` it is {replica.state}")
        await asyncio.sleep(POLL_S)


async def _refusal(scene: Scene) -> str:
    """Return what a client hears that asks while the only engine sleeps."""
    body = asks.completion(scene.model, "Hello", 1, stream=False)
    try:
        await asks.ask(scene.proxy, COMPLETIONS, body, REFUSED_WITHIN_S)
    except RunError as error:
        return str(error)
    return "it answered"
