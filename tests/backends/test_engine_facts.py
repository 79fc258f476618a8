"""What is said of an engine is how the simulator behaves when it plays it, started by our line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from backends.engines import ENGINES
from backends.engines.base import Ports
from backends.engines.facts import Facts
from backends.engines.release import UNKNOWN_RELEASE
from backends.simulator.flags import parse_flags
from backends.simulator.settings import Settings
from backends.spec import ReplicaSpec
from tests.fakes.simulator import FAST, Simulated, simulator

DIALECTS = ("vllm", "sglang")
ASK = {"model": "m", "prompt": "p" * 40, "max_tokens": 4}
LONG_ASK = {**ASK, "max_tokens": 20_000}


def spec_of(engine: str) -> ReplicaSpec:
    return ReplicaSpec(replica_id="m-0", model="m", pool="m", engine=engine, sleep=True)


def facts_of(engine: str) -> Facts:
    return ENGINES[engine].facts(spec_of(engine))


def settings_of(engine: str) -> Settings:
    """Return what the simulator understands of an engine's command."""
    argv = ENGINES[engine].command(spec_of(engine), Ports(0), UNKNOWN_RELEASE).argv
    model = argv.index("m")
    return parse_flags(["--dialect", engine, "--model", "m", *argv[model + 1 :]])


@asynccontextmanager
async def running(engine: str, **changes: object) -> AsyncIterator[Simulated]:
    settings = settings_of(engine)
    changes |= {"profile": FAST.profile, "time_scale": FAST.time_scale}
    changed = msgspec.structs.replace(settings, **changes)
    async with simulator(**msgspec.structs.asdict(changed)) as simulated:
        yield simulated


async def put_to_sleep(engine: str, simulated: Simulated) -> None:
    for call in ENGINES[engine].sleep_calls(spec_of(engine), 1):
        ask = simulated.post(call.path, call.body) if call.method == "POST" else None
        status, _ = await (ask or simulated.get(call.path))
        assert status in call.statuses


@pytest.mark.parametrize("engine", DIALECTS)
async def test_one_path_says_alive_awake_and_asleep(engine: str) -> None:
    facts = facts_of(engine)
    async with running(engine) as simulated:
        assert (await simulated.get(facts.alive_path))[0] == 200
        await put_to_sleep(engine, simulated)
        assert (await simulated.get(facts.alive_path))[0] == 200
        assert (await simulated.state())["finished"] == 0, "nothing was computed for it"


@pytest.mark.parametrize("engine", DIALECTS)
async def test_readiness_and_rest(engine: str) -> None:
    facts = facts_of(engine)
    async with running(engine) as simulated:
        assert (await simulated.get(facts.ready_paths[0]))[0] == 200
        await put_to_sleep(engine, simulated)
        says_no = (await simulated.get(facts.ready_paths[0]))[0] == 503
        assert says_no is facts.ready_tells_rest
        assert (await simulated.state())["finished"] == 0


@pytest.mark.parametrize("engine", DIALECTS)
async def test_paths_that_compute(engine: str) -> None:
    async with running(engine) as simulated:
        for count, path in enumerate(facts_of(engine).generating_paths, 1):
            assert (await simulated.get(path))[0] == 200
            assert (await simulated.state())["finished"] == count


async def test_all_is_aborted_where_sigterm_would_wait() -> None:
    facts = facts_of("sglang")
    assert facts.abort_path is not None
    assert facts_of("vllm").abort_path is None
    assert settings_of("vllm").shutdown_timeout_s == 30, "which bounds its own drain"
    async with running("sglang") as simulated:
        task = asyncio.ensure_future(simulated.post("/v1/completions", LONG_ASK))
        await simulated.until(lambda state: state["running"] == 1)
        assert (await simulated.post(facts.abort_path, facts.abort_body))[0] == 200
        assert (await task)[1]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("engine", DIALECTS)
def test_a_lower_number_runs_first(engine: str) -> None:
    settings = settings_of(engine)
    assert (settings.rank(1) < settings.rank(2)) is facts_of(engine).lower_priority_first
    assert settings.rank(1) != settings.rank(2)


@pytest.mark.parametrize("engine", DIALECTS)
async def test_request_ids(engine: str) -> None:
    where, name = facts_of(engine).request_id
    async with running(engine) as simulated:
        body, headers = dict(ASK), {}
        if where == "body":
            body[name] = "mine-1"
        else:
            headers[name] = "mine-1"
        data = msgspec.json.encode(body)
        url = simulated.url + "/v1/completions"
        async with simulated.session.post(url, data=data, headers=headers) as response:
            assert "mine-1" in (await response.json())["id"]
            echoed = response.headers.get("X-Request-Id") == "mine-1"
        assert echoed is facts_of(engine).echoes_request_id


@pytest.mark.parametrize("engine", DIALECTS)
async def test_a_request_is_pinned_to_a_rank(engine: str) -> None:
    async with running(engine, dp_size=2) as simulated:
        header = facts_of(engine).rank_header
        for rank in ("1", "1", "1"):
            assert (await simulated.post("/v1/completions", ASK, {header: rank}))[0] == 200
        counts = [engine.tally.generation_tokens for engine in simulated.process.ranks.engines]
        assert [sum(count) for count in counts] == [0, 12]
        assert (await simulated.post("/v1/completions", ASK, {header: "2"}))[0] == 400


@pytest.mark.parametrize("engine", DIALECTS)
async def test_the_shape_of_errors(engine: str) -> None:
    async with running(engine) as simulated:
        status, body = await simulated.post("/v1/completions", {**ASK, "temperature": -1})
        assert status == 400
        shape = "nested" if "error" in body else "flat"
        assert shape == facts_of(engine).error_shape
        recorded = body["error"] if shape == "nested" else body
        assert {"message", "type", "code"} <= set(recorded)


def test_the_simulator_behaves_as_the_engine_it_plays() -> None:
    for dialect in DIALECTS:
        played = msgspec.structs.replace(spec_of("simulator"), args=("--dialect", dialect))
        assert ENGINES["simulator"].facts(played) is facts_of(dialect)
