"""Steps: the engine comes up, and answers through the proxy as clients expect it to."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
from pathlib import Path

import orjson

from loadtest.fleet import get
from loadtest.gpu import events, machine, official
from loadtest.gpu.asks import CHAT, COMPLETIONS, ask, chat, completion, words
from loadtest.gpu.scene import Scene
from loadtest.gpu.stack import carriers, run_program
from loadtest.gpu.steps import Findings, SkipError, Step

READY = "ready"
USUAL_START_S = 60.0  # of a real engine whose compile caches are warm
ANSWER_TOKENS = 32
PROMPT_WORDS = 1500
PROMPT_SHARE_MIN = 0.9  # of a prompt that was just computed; engines keep whole blocks
SHOWN_CHARACTERS = 60

# Lines of the engines' logs that say how long a phase of the start took, as far as they are known.
_PHASES = (
    ("weights_s", re.compile(r"Model loading took \S+ GiB(?: memory)? and ([0-9.]+) s")),
    ("compile_s", re.compile(r"torch\.compile took ([0-9.]+) s|torch\.compile takes ([0-9.]+) s")),
    ("graphs_s", re.compile(r"Graph capturing finished in ([0-9.]+) s")),
    ("engine_init_s", re.compile(r"init engine .*? took ([0-9.]+) s")),
    ("weights_s", re.compile(r"Load weight end\..*?elapsed=([0-9.]+) s")),
    ("graphs_s", re.compile(r"Capture (?:\w+ )?(?:CUDA|cuda) graph end\. .*?([0-9.]+) s")),
)


def ready_step(scene: Scene) -> Step:
    """Return the first step: a start takes what it takes, up to the limit of its own."""
    return Step(
        name=READY,
        run=functools.partial(ready, scene),
        usual_s=USUAL_START_S if scene.engine_name != "simulator" else 3.0,
        limit_s=scene.stack.options.start_timeout_s + 10.0,
    )


async def ready(scene: Scene, found: Findings) -> None:
    """The whole start: `doherty up` to a proxy that would serve."""
    scene.gpu_mib_before = await scene.used_mib()
    await scene.stack.start()
    found.figures |= await scene.stack.until_ready()
    scene.begin()
    found.figures |= phases(scene.stack.engine_log)
    if (used_mib := await scene.used_mib()) is not None:
        found.figures["gpu_mib"] = used_mib - (scene.gpu_mib_before or 0)
    found.figures["proxy_runs"] = machine.proxy_kind(carriers(scene.stack.mark))
    load = await scene.gauge.read()
    found.figures["kv_capacity_tokens"] = load.kv_capacity_tokens
    scene.header |= await _versions(scene)
    replica = await scene.stack.replica()
    commands = carriers(scene.stack.mark).values()
    source = await events.find_source(scene.engine, replica, commands)
    if source is not None:
        scene.listener = events.Listener(source)
        found.figures["kv_events"] = f"{source.endpoint}, by {source.told_by}"
        found.claim(await scene.listener.connected(), "the engine's events can be subscribed to")


async def _versions(scene: Scene) -> dict[str, str]:
    """Return the versions of what runs the engine."""
    replica = await scene.stack.replica()
    told = await asyncio.to_thread(machine.versions, scene.engine_name, replica.pid)
    status, body = await get(scene.engine, "/version")
    if status == 200:
        told["engine says"] = str(orjson.loads(body).get("version"))
    texts = [f"{name} {version}" for name, version in told.items()]
    return {"engine": f"{scene.stack.options.engine}: {', '.join(texts) or 'not told'}"}


def phases(log: Path) -> dict[str, float]:
    """Return the seconds of the phases that an engine's log tells."""
    try:
        text = log.read_text("utf-8", "replace")
    except OSError:
        return {}
    found: dict[str, float] = {}
    for name, pattern in _PHASES:
        for match in pattern.finditer(text):
            value = next(group for group in match.groups() if group)
            found[name] = round(found.get(name, 0.0) + float(value), 2)
    return found


async def official_client(scene: Scene, found: Findings) -> None:
    """A streamed chat by the OpenAI client, by the first interpreter that has it."""
    url, words_of = f"{scene.stack.proxy_url}/v1", (scene.model, str(ANSWER_TOKENS))
    for python in dict.fromkeys((sys.executable, *machine.interpreters(scene.engine_name))):
        status, out, err = await run_program((python, "-P", official.__file__, url, *words_of))
        if status != official.MISSING_STATUS:
            break
    else:
        raise SkipError("the package openai is installed neither here nor beside the engine")
    if status:
        said = err.strip().splitlines()[-1:] or ["it said nothing"]
        found.claim(False, f"the client failed: {said[0]}")
        return
    found.figures |= json.loads(out)
    found.claim(int(found.figures["pieces"] or 0) > 1, "the answer came in pieces")
    found.claim(found.figures["finish_reason"] == "length", "it ended by its length")
    found.claim(
        found.figures["completion_tokens"] == ANSWER_TOKENS, f"usage says {ANSWER_TOKENS} tokens"
    )


async def whole_answer(scene: Scene, found: Findings) -> None:
    """An answer that is no stream: its text and its usage."""
    asked = [{"role": "user", "content": words(200, scene.draw)}]
    answer = await ask(scene.proxy, CHAT, chat(scene.model, asked, ANSWER_TOKENS, stream=False))
    found.figures |= {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "whole_s": answer.total_s,
        "text": answer.text[:SHOWN_CHARACTERS],
    }
    found.claim(bool(answer.text), "it has a text")
    found.claim(answer.completion_tokens == ANSWER_TOKENS, f"it has {ANSWER_TOKENS} tokens")


async def cached_again(scene: Scene, found: Findings) -> None:
    """The same prompt twice: the second time the engine reports it cached, and is quicker."""
    body = completion(scene.model, words(PROMPT_WORDS, scene.draw), 4)
    cold = await ask(scene.proxy, COMPLETIONS, body)
    warm = await ask(scene.proxy, COMPLETIONS, body)
    found.figures |= {
        "prompt_tokens": warm.prompt_tokens,
        "cached_cold": cold.cached_tokens,
        "cached_warm": warm.cached_tokens,
        "first_cold_s": cold.first_s,
        "first_warm_s": warm.first_s,
    }
    found.claim(cold.cached_tokens == 0, "nothing of a new prompt is reported cached")
    least = PROMPT_SHARE_MIN * warm.prompt_tokens
    found.claim((warm.cached_tokens or 0) >= least, f"at least {least:.0f} tokens reported cached")
    found.claim(warm.first_s < cold.first_s, "the first token comes sooner from the cache")


async def conversation(scene: Scene, found: Findings) -> None:
    """Turns of one conversation: each finds what the turn before left."""
    head = {"role": "system", "content": words(scene.measure.head_words, scene.draw)}
    messages, before, rows = [head], 0, []
    for turn in range(scene.measure.turns):
        messages.append({"role": "user", "content": words(80, scene.draw)})
        answer = await ask(
            scene.proxy, CHAT, chat(scene.model, messages, ANSWER_TOKENS, stream=False)
        )
        cached = answer.cached_tokens or 0
        rows.append(f"turn {turn + 1}: {answer.prompt_tokens} tokens, {cached} cached")
        if turn:
            least = PROMPT_SHARE_MIN * before
            found.claim(cached >= least, f"turn {turn + 1} finds {least:.0f} tokens cached")
        before = answer.prompt_tokens
        messages.append({"role": "assistant", "content": answer.text})
    found.table = "\n".join(rows)
