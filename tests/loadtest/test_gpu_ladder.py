"""The ladder's steps against a manager and a proxy that are one small server."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from loadtest.gpu import holding, ladder, rungs
from loadtest.gpu.rungs import Ladder
from loadtest.gpu.scene import QUICK, Scene
from loadtest.gpu.stack import Stack, StackOptions, client, config_of
from loadtest.gpu.steps import Findings, SkipError
from loadtest.run import RunError


class Replica:
    """Answers as its phase allows, and goes where it is told after a moment."""

    def __init__(self) -> None:
        self.phase = "ready"
        self.reason = ""
        self.wishes: list[str] = []
        self.salt = ""
        self.cached = 89  # whole pages of the 100 tokens of a prompt
        self.sticks = False

    async def tell(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"phase": self.phase, "reason": self.reason, "url": "http://x", "pid": 0}
        )

    async def wish(self, request: web.Request) -> web.Response:
        rung = request.query.get("rung", "")
        self.wishes.append(rung or request.match_info["wish"])
        if rung == "refused":
            return web.json_response({"error": {"message": "it is busy"}}, status=409)
        if not self.sticks:
            self.phase = "emptying" if rung else "waking"
            asyncio.get_running_loop().call_later(0.02, self._turn, rung or "ready")
        return web.json_response({})

    def _turn(self, phase: str) -> None:
        self.phase = phase

    async def complete(self, request: web.Request) -> web.Response:
        if self.phase != "ready":
            return web.json_response({"error": {"message": "asleep"}}, status=503)
        prompt = (await request.json())["prompt"]
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        return web.json_response({"choices": [{"text": prompt[:9] + self.salt}], "usage": usage})


@asynccontextmanager
async def climbing(tmp_path: Path) -> AsyncIterator[tuple[Ladder, Replica]]:
    replica = Replica()
    app = web.Application()
    app.add_routes(
        [
            web.get("/v1/replicas/m-0", replica.tell),
            web.post("/v1/replicas/m-0/{wish}", replica.wish),
            web.post("/v1/completions", replica.complete),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    stack = Stack(StackOptions(), tmp_path)
    stack.replica_id = "m-0"
    scene = Scene(stack, QUICK, 1)
    scene.proxy = client(f"http://127.0.0.1:{port}")
    climber = Ladder(scene)
    climber.manager = client(f"http://127.0.0.1:{port}")
    try:
        yield climber, replica
    finally:
        climber.close()
        await scene.close()
        await runner.cleanup()


async def test_a_rung_is_timed_and_its_answers_are_compared(tmp_path: Path) -> None:
    async with climbing(tmp_path) as (climber, replica):
        found = Findings()
        await climber.remember(found)
        await rungs.with_its_cache(climber, found)
        assert replica.wishes == ["suspended", "wake", "suspended", "wake"]
        assert found.broken == []
        assert found.figures["answers_same"] == "4 of 4"
        assert found.figures["cached_tokens"] == "89 of 100"
        assert isinstance(found.figures["first_up_s"], float)
        replica.cached = 64
        await climber.same_as_before(found, cache_kept=True)
        assert found.broken.pop() == "its prefix cache is kept"
        replica.salt = "!"  # the weights did not come back whole
        await rungs.asleep(climber, found)
        assert found.broken == ["greedy answers are the same as before"]
        anew = Findings()  # another process, which may differ from the first, but not from itself
        await climber.remember(anew)
        await rungs.asleep(climber, anew)
        assert anew.broken == []
        assert anew.figures["answers_same_as_of_the_last_start"] == "0 of 4"
        assert anew.figures["answers_same"] == "4 of 4"


async def test_a_refusal_and_a_command_that_is_not_there_are_told_apart(tmp_path: Path) -> None:
    async with climbing(tmp_path) as (climber, _):
        with pytest.raises(RunError, match="it is busy"):
            await climber.wish("/v1/replicas/m-0/sleep?rung=refused")
        with pytest.raises(SkipError, match="has no /v1/pools"):
            await climber.scale(0)
        with pytest.raises(SkipError, match="no image"):
            await rungs.from_disk(climber, Findings(), 1)
        with pytest.raises(SkipError, match="no image"):
            await rungs.copies(climber, Findings(), 2)


async def test_a_replica_that_goes_nowhere_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rungs, "PATIENCE_S", 0.1)
    async with climbing(tmp_path) as (climber, replica):
        replica.phase, replica.sticks = "emptying", True
        with pytest.raises(RunError, match="it is emptying, not suspended"):
            await rungs.down_and_up(climber, Findings(), "suspended")
        with pytest.raises(RunError, match="no answer in"):
            await climber.first_answer()


@pytest.mark.parametrize(("engine", "broken"), [("vllm", 1), ("simulator", 0)])
async def test_the_share_of_a_start_is_claimed_of_real_engines(
    tmp_path: Path, engine: str, broken: int
) -> None:
    async with climbing(tmp_path) as (climber, _):
        climber.scene.stack.options = StackOptions(engine=engine)
        climber.start_s = 40.0
        found = Findings()
        rungs.compared(climber, found, 5.0, 8)
        assert found.broken == []
        rungs.compared(climber, found, 5.1, 8)
        assert len(found.broken) == broken
        assert found.figures["sooner_by"] == "7.8 x"


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ladder.add_arguments(parser)
    return parser.parse_args(["--engine", "simulator", *words])


async def test_steps_are_those_that_were_asked_for(tmp_path: Path) -> None:
    async with climbing(tmp_path) as (climber, _):
        names = [step.name for step in ladder.all_steps(climber, arguments())]
        assert names[0] == "ready"
        assert names[-1] == "drain and stop"
        assert not any("swapped" in name or "copies" in name for name in names)
        wanted = arguments("--swap", "3", "--copies", "2", "--without", "asleep,from")
        names = [step.name for step in ladder.all_steps(climber, wanted)]
        assert "swapped 3 times" in names
        assert "2 copies" in names
        assert "from disk" not in names
        assert "asleep and suspended" not in names


async def test_an_image_is_tried_whatever_else_failed_and_sglang_makes_it_by_itself(
    tmp_path: Path,
) -> None:
    async with climbing(tmp_path) as (climber, _):
        for engine, starts in (
            ("vllm", ["start with warm caches, and an image"]),
            ("sglang", ["start with warm caches", "an image, by another start"]),
        ):
            wanted = arguments("--engine", engine, "--copies", "2", "--swap", "1", "--gpus", "3")
            steps = ladder.all_steps(climber, wanted)
            assert [s.name for s in steps if "start" in s.name] == starts
            needs = {step.name: step.needs for step in steps}
            assert needs["from disk"] == needs["2 copies"] == "ready"
            second = next(step for step in steps if step.name.startswith("second"))
            assert second.limit_s >= 2 * wanted.start_timeout


def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.run(arguments("--swap", "-1")) == 2
    assert "--swap: expected 0 or more" in capsys.readouterr().err


def test_further_keys_and_models_reach_the_configuration(tmp_path: Path) -> None:
    options = StackOptions(
        pool={"autoscale": {"max": 1}, "target_inputs": 4},
        manager={"gpus": "0"},
        others=("other",),
    )
    config = config_of(options, Stack(options, tmp_path).ports, "run", frozenset({"sleep"}))
    assert [model["name"] for model in config["models"]] == ["m", "other"]
    pool = config["models"][1]["pools"][0]
    assert "replicas" not in pool
    assert pool["autoscale"] == {"max": 1}
    assert config["manager"]["gpus"] == "0"
    assert orjson.dumps(config)


def test_a_tree_is_found_and_weighed(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while len(tree := holding.tree_of(process.pid)) < 2:
            assert process.poll() is None
        assert tree[0] == process.pid
        held = holding.held_by(process.pid)
        assert held.processes == 2
        assert held.host_mib > 1
    finally:
        for pid in reversed(holding.tree_of(process.pid)):
            subprocess.run(["kill", "-9", str(pid)], check=True)
        process.wait()
    assert holding.tree_of(2**22 - 1) == []
    (tmp_path / "image").write_bytes(b"x" * (3 << 20))
    assert holding.folder_mib(tmp_path) == 3
