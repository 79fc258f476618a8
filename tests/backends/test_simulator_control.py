"""Health, load, metrics, sleep, pause, abort, release: each in its dialect's manner."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.simulator.profiles import PROFILES
from tests.fakes.simulator import Simulated, simulator

GOLDEN = Path(__file__).parents[1] / "golden"
ASK = {"model": "demo", "prompt": "p" * 400, "max_tokens": 4}
LONG_ASK = {**ASK, "max_tokens": 2000}


async def start_long(engine: Simulated, **changes: Any) -> asyncio.Task[tuple[int, Any]]:
    """Start a request of some 2 simulated seconds and wait until it runs."""
    before = (await engine.state())["running"]
    task = asyncio.ensure_future(engine.post("/v1/completions", {**LONG_ASK, **changes}))
    await engine.until(lambda state: state["running"] > before)
    return task


def parse_metrics(text: str) -> tuple[dict[str, str], dict[str, set[tuple[str, ...]]]]:
    """Return the type of each family and the label names of each series."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    labels: dict[str, set[tuple[str, ...]]] = {}
    for name, inner in re.findall(r"^([a-z:_]\S*?)\{(.*)\} \S+$", text, re.MULTILINE):
        names = tuple(sorted(re.findall(r'(\w+)="', inner)))
        labels.setdefault(name, set()).add(names)
    return kinds, labels


def buckets(text: str, name: str) -> list[float]:
    """Return the distinct bounds of a histogram in order."""
    found = re.findall(rf'^{name}_bucket\{{.*?le="([^"]+)"', text, re.MULTILINE)
    return sorted({float(bound) for bound in found})


def value_of(text: str, name: str) -> float:
    """Return the sum over the series of a metric."""
    return sum(
        float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    )


# Not in the recordings: an engine shows them once they are not zero.
UNRECORDED = {"sglang:num_aborted_requests_total", "sglang:num_retracted_requests_total"}


@pytest.mark.parametrize(
    ("dialect", "name"), [("vllm", "vllm-0.26.0"), ("sglang", "sglang-0.5.17")]
)
async def test_metrics_have_the_recorded_names_types_labels_and_buckets(
    dialect: str, name: str
) -> None:
    recorded = (GOLDEN / f"{name}-metrics.txt").read_text()
    async with simulator(dialect=dialect) as engine:
        await engine.post("/v1/completions", ASK)
        _, text = await engine.get("/metrics")
    kinds, labels = parse_metrics(text)
    kinds_recorded, labels_recorded = parse_metrics(recorded)
    assert len(kinds) > 15
    for family in kinds.keys() - UNRECORDED:
        assert kinds[family] == kinds_recorded[family], family
        if kinds[family] == "histogram":
            assert buckets(text, family) == buckets(recorded, family), family
    for series in labels.keys() - UNRECORDED:
        ours, theirs = labels[series], labels_recorded[series]
        if series == "vllm:cache_config_info":
            assert set(*ours) <= set(*theirs)
        else:
            assert ours == theirs, series


async def test_metrics_count() -> None:
    async with simulator() as engine:
        for _ in range(2):
            await engine.post("/v1/completions", ASK)
        _, text = await engine.get("/metrics")
        for name, value in {
            "vllm:prompt_tokens_total": 200,
            "vllm:generation_tokens_total": 8,
            "vllm:prefix_cache_queries_total": 200,
            "vllm:prefix_cache_hits_total": 96,
            "vllm:request_success_total": 2,
            "vllm:time_to_first_token_seconds_count": 2,
            "vllm:inter_token_latency_seconds_count": 6,
            "vllm:e2e_request_latency_seconds_count": 2,
            "vllm:num_requests_running": 0,
            "vllm:kv_cache_usage_perc": 0,
        }.items():
            assert value_of(text, name) == value, name
        assert 'num_gpu_blocks="4096"' in text
        task = await start_long(engine)
        _, text = await engine.get("/metrics")
        assert value_of(text, "vllm:num_requests_running") == 1
        assert value_of(text, "vllm:kv_cache_usage_perc") > 0
        await task


async def test_loads_have_the_recorded_shape() -> None:
    recorded = msgspec.json.decode((GOLDEN / "sglang-0.5.17-loads.json").read_bytes())
    async with simulator(dialect="sglang") as engine:
        task = await start_long(engine)
        _, loads = await engine.get("/v1/loads")
        assert list(loads) == list(recorded)
        load, told = loads["loads"][0], recorded["loads"][0]
        assert set(load) <= set(told)
        assert set(told) - set(load) == {"decode_moments"}
        assert load["num_running_reqs"] == 1
        assert load["max_total_num_tokens"] == 65_536
        assert load["num_used_tokens"] >= 400 // 4
        await task


async def test_small_talk() -> None:
    async with simulator(load_tracking=True) as engine:
        assert (await engine.get("/health"))[0] == 200
        assert (await engine.post("/ping"))[0] == 200
        assert await engine.get("/version") == (200, {"version": "0.33.0"})
        task = await start_long(engine)
        assert await engine.get("/load") == (200, {"server_load": 1})
        await task
        assert await engine.get("/load") == (200, {"server_load": 0})
        assert (await engine.post("/sleep"))[0] == 404
    async with simulator(dialect="sglang") as engine:
        assert (await engine.get("/ready"))[0] == 200
        assert (await engine.get("/health_generate"))[0] == 200
        assert (await engine.state())["finished"] == 1
        assert (await engine.get("/server_info"))[1]["version"] == "0.5.23"
        assert (await engine.get("/model_info"))[1]["is_generation"] is True


@pytest.mark.parametrize("level", [1, 2])
async def test_vllm_sleeps_and_wakes(level: int) -> None:
    async with simulator(sleep_mode=True) as engine:
        await engine.post("/v1/completions", ASK)
        task = await start_long(engine)
        status, value = await engine.post(f"/sleep?level={level}")
        assert (status, value) == (200, {"status": "sleeping", "level": level})
        _, ended = await task
        assert ended["choices"][0]["finish_reason"] == "abort"
        assert await engine.get("/is_sleeping") == (200, {"is_sleeping": True})
        assert (await engine.get("/health"))[0] == 200
        status, value = await engine.post("/v1/completions", ASK)
        assert (status, value["error"]["type"]) == (503, "engine_paused")
        _, text = await engine.get("/metrics")
        state = "weights_offloaded" if level == 1 else "discard_all"
        assert f'sleep_state="{state}"}} 1.0' in text
        assert (await engine.post(f"/sleep?level={level}"))[0] == 200  # misuse is harmless
        if level == 2:
            _, value = await engine.post("/wake_up?tags=weights")
            assert value == {"status": "sleeping", "tags": ["weights"]}
            _, value = await engine.post("/wake_up?tags=kv_cache")
        else:
            _, value = await engine.post("/wake_up")
        assert value["status"] == "awake"
        assert (await engine.post("/wake_up"))[0] == 200
        _, value = await engine.post("/v1/completions", ASK)
        assert value["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_sleep_may_wait_for_what_runs_or_keep_it() -> None:
    async with simulator(sleep_mode=True) as engine:
        task = await start_long(engine)
        assert (await engine.post("/sleep?mode=wait"))[0] == 200
        assert (await task)[1]["choices"][0]["finish_reason"] == "length"
        await engine.post("/wake_up")
        task = await start_long(engine)
        assert (await engine.post("/sleep?mode=keep"))[0] == 200
        late = asyncio.ensure_future(engine.post("/v1/completions", ASK))
        state = await engine.until(lambda state: state["waiting"] == 2)
        assert (state["running"], state["blocks_used"]) == (0, 0)
        await engine.post("/wake_up")
        assert (await task)[1]["usage"]["completion_tokens"] == 2000
        assert (await late)[0] == 200
        for query in ("level=3", "mode=never"):
            assert (await engine.post(f"/sleep?{query}"))[0] == 400
        assert (await engine.post("/wake_up?tags=dream"))[0] == 400


async def test_sleep_takes_the_profiles_time() -> None:
    profile = msgspec.structs.replace(
        PROFILES["fast"], sleep_first_s=0.4, sleep_s=0.2, wake_s=0.1, discard_s=0.05, remap_s=0.03
    )
    async with simulator(sleep_mode=True, profile=profile, time_scale=1.0) as engine:
        clock = asyncio.get_running_loop().time
        spent = []
        for path in ("/sleep", "/wake_up", "/sleep", "/wake_up", "/sleep?level=2", "/wake_up"):
            begun = clock()
            await engine.post(path)
            spent.append(clock() - begun)
        # Only from below: a busy machine may be late, never early.
        for took, least in zip(spent, (0.4, 0.1, 0.2, 0.1, 0.05, 0.03), strict=True):
            assert took >= least - 0.002


async def test_vllm_pauses_and_aborts_by_id() -> None:
    async with simulator() as engine:
        assert (await engine.post("/pause?mode=keep"))[0] == 200
        assert await engine.get("/is_paused") == (200, {"is_paused": True})
        task = asyncio.ensure_future(engine.post("/v1/completions", ASK))
        await engine.until(lambda state: state["waiting"] == 1)
        await engine.post("/resume")
        assert (await task)[0] == 200
        one = await start_long(engine, request_id="one")
        two = await start_long(engine, request_id="two")
        await engine.post("/abort_requests", {"request_ids": ["one"]})
        assert (await one)[1]["choices"][0]["finish_reason"] == "abort"
        assert (await two)[1]["choices"][0]["finish_reason"] == "length"


async def test_the_prefix_cache_is_reset_when_nobody_holds_it() -> None:
    async with simulator() as engine:
        await engine.post("/v1/completions", ASK)
        task = await start_long(engine)
        assert await engine.post("/reset_prefix_cache") == (200, {"success": False})
        await task
        assert await engine.post("/reset_prefix_cache") == (200, {"success": True})
        assert (await engine.state())["blocks_cached"] == 0


async def test_sglang_pauses_flushes_releases_and_resumes() -> None:
    async with simulator(dialect="sglang") as engine:
        await engine.post("/v1/completions", ASK)
        task = await start_long(engine)
        assert (await engine.post("/flush_cache"))[0] == 400
        assert (await engine.post("/pause_generation", {"mode": "abort"}))[0] == 200
        assert (await task)[1]["choices"][0]["finish_reason"] == "abort"
        assert (await engine.get("/ready"))[0] == 503
        status, text = await engine.post("/flush_cache?timeout=5")
        assert status == 200
        assert text.startswith("Cache flushed.")
        assert (await engine.post("/release_memory_occupation"))[0] == 400  # needs a body
        assert await engine.post("/release_memory_occupation", {}) == (200, None)
        late = asyncio.ensure_future(engine.post("/v1/completions", ASK))
        await engine.until(lambda state: state["waiting"] == 1)
        tags = {"tags": ["weights", "cuda_graph"]}
        assert await engine.post("/resume_memory_occupation", tags) == (200, None)
        assert (await engine.state())["released"] == ["kv_cache"]
        assert (await engine.post("/resume_memory_occupation", {"tags": ["x"]}))[0] == 400
        await engine.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
        assert not late.done()
        assert (await engine.post("/continue_generation", {}))[0] == 200
        assert (await late)[0] == 200
        assert (await engine.get("/ready"))[0] == 200


async def test_sglang_retracts_and_aborts() -> None:
    async with simulator(dialect="sglang") as engine:
        task = await start_long(engine, rid="r")
        await engine.post("/pause_generation", {"mode": "retract"})
        state = await engine.until(lambda state: not state["running"])
        assert (state["waiting"], state["blocks_used"]) == (1, 0)
        await engine.post("/continue_generation")
        assert (await task)[1]["usage"]["completion_tokens"] == 2000
        task = await start_long(engine, rid="r2")
        await engine.post("/abort_request", {"rid": "other"})
        await engine.post("/abort_request", {"rid": ""})
        assert (await engine.state())["running"] == 1
        await engine.post("/abort_request", {"rid": "r2"})
        assert (await task)[1]["choices"][0]["finish_reason"] == "abort"


async def test_sglang_sees_late_that_a_client_has_left_and_ends_what_it_is_told_to() -> None:
    ask = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2000}
    path, named = "/v1/chat/completions", {"x-override-rid": "one"}
    async with simulator(dialect="sglang", header_overrides=True, notice_s=3600.0) as engine:
        task = asyncio.ensure_future(engine.post(path, ask, named))
        await engine.until(lambda state: state["running"] == 1)
        assert (await engine.post(path, ask, named))[0] == 400  # two of one name
        task.cancel()
        await asyncio.sleep(0.05)
        assert (await engine.state())["running"] == 1
        await engine.post("/abort_request", {"rid": "one"})
        await engine.until(lambda state: not state["running"])
    async with simulator(dialect="sglang", notice_s=0.2) as engine:
        tasks = [asyncio.ensure_future(engine.post(path, ask, named)) for _ in range(2)]
        await engine.until(lambda state: state["running"] == 2)  # nobody reads their name
        for task in tasks:
            task.cancel()
        await engine.until(lambda state: not state["running"])


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (["/resume_memory_occupation"], "not released"),
        (["/release_memory_occupation", *["/resume_memory_occupation"] * 2], "not released"),
        (["busy", "/release_memory_occupation"], "not idle"),
        (["/release_memory_occupation", "busy"], "released memory"),
    ],
)
async def test_misused_memory_calls_kill_sglang(calls: list[str], reason: str) -> None:
    async with simulator(dialect="sglang") as engine:
        pending = []
        for call in calls:
            if call == "busy":
                task = asyncio.ensure_future(engine.post("/v1/completions", LONG_ASK))
                await engine.until(
                    lambda state: state["running"] == 1 or engine.process.ranks.dead.done()
                )
            else:
                task = asyncio.ensure_future(engine.post(call, {}))
                while not task.done() and not engine.process.ranks.dead.done():
                    await asyncio.sleep(0.005)
            pending.append(task)
        assert reason in await engine.process.ranks.dead
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)


async def test_a_schedule_that_fell_far_behind_starts_afresh_and_says_so() -> None:
    async with simulator() as engine:
        task = await start_long(engine)
        engine.process.ranks.first.clock._start_s -= (
            10  # as if the machine had stood still for 10 s
        )
        state = await engine.until(lambda state: state["late_s"] > 0)
        assert state["late_s"] > 9 * 4  # simulated seconds, four to a real one
        assert not task.done()  # the lost time is not made up for in a burst
        assert (await task)[1]["usage"]["completion_tokens"] == 2000


async def test_the_health_probe_may_generate() -> None:
    async with simulator(dialect="sglang", health_generation=True) as engine:
        assert (await engine.get("/health"))[0] == 200
        assert (await engine.state())["finished"] == 1


async def test_an_engine_that_fails_is_dead() -> None:
    async with simulator() as engine:
        engine.process.ranks.first.clockwork.plan = None  # type: ignore[method-assign,assignment]
        task = asyncio.ensure_future(engine.post("/v1/completions", ASK))
        assert "TypeError" in await engine.process.ranks.dead
        task.cancel()
        await asyncio.wait([task])
