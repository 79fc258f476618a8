"""Proofs in front of an engine: the steps, the sums, and a small run with the simulator."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from loadtest.__main__ import main
from loadtest.client import Client
from loadtest.gpu import caching, cost, gauges, machine, paired, prove, serving, sleeping
from loadtest.gpu.asks import cached_tokens
from loadtest.gpu.caching import FRESH, HEAD, Guess
from loadtest.gpu.cost import Cell, CostOptions, GapReader
from loadtest.gpu.events import Listener, Source, find_source, here
from loadtest.gpu.gauges import EngineLoad
from loadtest.gpu.leaving import Watch
from loadtest.gpu.paired import Comparison, Difference, Judgement
from loadtest.gpu.scene import Measure, Scene
from loadtest.gpu.stack import Replica, Stack, StackOptions, config_of, pool_keys_of
from loadtest.gpu.steps import (
    Finding,
    Findings,
    SkipError,
    Step,
    Verdict,
    figure_text,
    report,
    run_steps,
    shown,
    status_of,
)
from loadtest.run import RunError

GOLDEN = Path(__file__).parents[1] / "golden"

# --- a run ----------------------------------------------------------------------------------------


def test_a_small_proof_in_front_of_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, value = tmp_path / "proof.txt", tmp_path / "proof.json"
    steps = "whole answer,prediction,events heard"
    command = ["gpu", "prove", "--quick", "--steps", steps, "--out", str(text)]
    engine = ["--kv-cache-tokens", "60000", "--kv-events-port", "0", "--time-scale", "3"]
    assert main([*command, "--json", str(value), "--", *engine]) == 0
    said = capsys.readouterr().out
    assert "PASS     ready" in said
    written = text.read_text()
    assert written.startswith("Proofs: simulator\n")
    assert machine.NO_GPU in written or "driver" in written
    assert "5 PASS, 0 FAIL, 0 NOT RUN" in written
    found = {one["name"]: one["figures"] for one in json.loads(value.read_text())["findings"]}
    assert list(found) == ["ready", *steps.split(","), "drain and stop"]
    assert found["whole answer"]["completion_tokens"] == serving.ANSWER_TOKENS
    assert found["prediction"]["median_error_percent"] <= caching.ERROR_PERCENT_MAX
    assert found["prediction"]["other_text_median_error_percent"] <= 2.0  # by the mean: 8
    assert found["events heard"]["stored_tokens_told"] > 5000
    assert found["drain and stop"]["processes_left"] == 0
    assert found["drain and stop"]["tokens"] == 200


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prove", "--engine", "vllm"], "--model-path: a real engine needs a folder"),
        (["prove", "--env", "A"], "--env A: expected NAME=VALUE"),
        (["prove", "--steps", "dance"], "no step 'dance'; there are "),
        (["cost", "--direct", "http://127.0.0.1:1"], "--direct and --proxy go together"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_starts(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", *arguments]) == 2
    assert told in capsys.readouterr().err


# --- steps ----------------------------------------------------------------------------------------


def _step(name: str, usual_s: float = 1.0, needs: str = "", **more: bool) -> Step:
    async def work(found: Findings) -> None:
        found.figures["done"] = True

    return Step(name=name, run=work, usual_s=usual_s, needs=needs, **more)


async def test_a_run_goes_on_after_a_failure_and_leaves_out_what_needs_it() -> None:
    async def broken(found: Findings) -> None:
        found.figures["answer"] = 41
        found.claim(False, "the answer is 42")
        await asyncio.sleep(0)

    async def fallen(_: Findings) -> None:
        raise RunError("it fell")

    async def skipped(_: Findings) -> None:
        raise SkipError("there is no GPU")

    steps = [
        Step(name="broken", run=broken, usual_s=1),
        Step(name="fallen", run=fallen, usual_s=1),
        Step(name="skipped", run=skipped, usual_s=1),
        _step("late", needs="broken"),
        _step("free"),
    ]
    said: list[str] = []
    found = await run_steps(steps, 0, said.append)
    assert [one.verdict.value for one in found] == ["FAIL", "FAIL", "NOT RUN", "NOT RUN", "PASS"]
    assert found[0].broken == ("the answer is 42",)
    assert found[1].broken == ("RunError: it fell",)
    assert found[2].broken == ("there is no GPU",)
    assert found[3].broken == ("needs the step 'broken'",)
    assert len(said) == 5
    assert said[0].splitlines()[1:] == ["         ! the answer is 42", "         answer  41"]


async def test_short_time_leaves_out_the_last_steps_but_never_the_end() -> None:
    steps = [_step("one", 20), _step("two", 100), _step("three", 60), _step("end", 30, kept=True)]
    found = await run_steps(steps, 100, lambda _: None)
    assert [one.verdict.value for one in found] == ["PASS", "NOT RUN", "PASS", "PASS"]
    assert status_of(found) == 0
    found = await run_steps(steps, 1, lambda _: None)
    assert [one.verdict.value for one in found] == ["NOT RUN", "NOT RUN", "NOT RUN", "PASS"]
    assert status_of(found) == 1  # nothing was proved


async def test_a_spare_step_makes_way_for_those_after_it() -> None:
    steps = [_step("spare", 50, spare=True), _step("needed", 60), _step("end", 30, kept=True)]
    found = await run_steps(steps, 100, lambda _: None)
    assert [one.verdict.value for one in found] == ["NOT RUN", "PASS", "PASS"]
    assert found[0].broken == (
        "it usually takes 50 s; 100 s are left, and the steps after it need 90",
    )
    found = await run_steps(steps, 200, lambda _: None)
    assert [one.verdict.value for one in found] == ["PASS"] * 3


async def test_a_step_that_hangs_is_given_up() -> None:
    async def hang(_: Findings) -> None:
        await asyncio.Event().wait()

    steps = [
        Step(name="hang", run=hang, usual_s=0.01),
        Step(name="hang at its limit", run=hang, usual_s=100, limit_s=0.01),
    ]
    for found in await run_steps(steps, 0, lambda _: None):
        assert found.verdict is Verdict.FAIL
        assert "had not ended" in found.broken[0]


def test_the_report_counts_the_verdicts() -> None:
    found = [
        Finding(name="one", verdict=Verdict.PASS, figures={"first_s": 0.0123}, table="a\nb"),
        Finding(name="two", verdict=Verdict.NOT_RUN, broken=("no time",)),
    ]
    text = report("Proofs", {"date": "today", "hardware": "none"}, found)
    assert text.splitlines()[2:4] == ["date      today", "hardware  none"]
    assert text.endswith("\n1 PASS, 0 FAIL, 1 NOT RUN\n")
    assert "         b" in shown(found[0]).splitlines()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("first_s", 0.0123, "12.3 ms"),
        ("whole_s", 12.34, "12.34"),
        ("tokens", 12345, "12,345"),
        ("same", True, "yes"),
        ("gpu_mib", None, "-"),
    ],
)
def test_figures_are_readable(name: str, value: float, text: str) -> None:
    assert figure_text(name, value) == text


# --- which steps ----------------------------------------------------------------------------------


def _scene_and_args(tmp_path: Path, *arguments: str) -> tuple[Scene, argparse.Namespace]:
    parser = argparse.ArgumentParser()
    prove.add_arguments(parser)
    return Scene(Stack(StackOptions(), tmp_path), Measure(), 1), parser.parse_args(arguments)


async def test_an_engine_without_sleep_mode_is_not_put_to_sleep(tmp_path: Path) -> None:
    scene = Scene(Stack(StackOptions(sleep=False), tmp_path), Measure(), 1)
    step = Step(name="sleep", run=functools.partial(sleeping.sleep_and_wake, scene), usual_s=30)
    (found,) = await run_steps([step], 0.0, lambda _: None)
    assert (found.verdict, found.broken) == (
        Verdict.NOT_RUN, ("the engine was started without sleep mode: --no-sleep",)
    )  # fmt: skip
    await scene.close()


def test_the_first_and_the_last_step_are_always_there(tmp_path: Path) -> None:
    scene, args = _scene_and_args(tmp_path, "--also", "echo {engine} --x", "--", "--dialect", "x")
    assert args.engine_args == ["--dialect", "x"]
    steps = prove.all_steps(scene, args)
    assert steps[-2].name == "also: echo {engine}"
    names = [step.name for step in prove.chosen(steps, "cost", "")]
    assert names == ["ready", "cost", "drain and stop"]
    assert "cost" not in [step.name for step in prove.chosen(steps, "", "cost")]
    assert prove.chosen(steps, "", "")[1:] == steps[1:]


# --- what is started ------------------------------------------------------------------------------


def test_a_pool_asks_for_sleep_only_where_there_is_such_a_key(tmp_path: Path) -> None:
    ports = Stack(StackOptions(), tmp_path).ports
    options = StackOptions(engine="vllm", model_path="models/m", args=("--seed", "0"))
    pool = config_of(options, ports, "run", frozenset())["models"][0]["pools"][0]
    assert "sleep" not in pool
    assert (pool["engine"], pool["model_path"], pool["args"]) == (
        "vllm",
        "models/m",
        ["--seed", "0"],
    )
    pool = config_of(options, ports, "run", frozenset({"sleep"}))["models"][0]["pools"][0]
    assert pool["sleep"] is True
    awake = msgspec.structs.replace(options, sleep=False)
    assert (
        "sleep" not in config_of(awake, ports, "run", frozenset({"sleep"}))["models"][0]["pools"][0]
    )


def test_the_keys_of_a_pool_come_from_the_schema() -> None:
    schema = {"$defs": {"PoolConfig": {"properties": {"engine": {}, "sleep": {}}}}}
    assert pool_keys_of(json.dumps(schema).encode()) == {"engine", "sleep"}
    assert pool_keys_of(b"usage: doherty") == frozenset()


# --- what engines say -----------------------------------------------------------------------------


def test_the_engines_own_gauges_are_read() -> None:
    load = gauges.read_metrics((GOLDEN / "vllm-0.26.0-metrics.txt").read_text())
    assert load is not None
    assert (load.running, load.waiting, load.kv_used_ratio) == (0, 0, 0.0)
    assert load.kv_capacity_tokens > 300_000
    load = gauges.read_loads((GOLDEN / "sglang-0.5.17-loads.json").read_bytes())
    assert load is not None
    assert (load.requests, load.kv_capacity_tokens) == (0, 343_968)
    assert gauges.read_metrics("up 1\n") is None
    assert gauges.read_loads(b'{"detail": "Not Found"}') is None


def test_series_are_summed_by_their_labels() -> None:
    page = '# HELP x y\nx{a="1",b="{2}"} 3\nx{a="2"} 4.5\ny 1\n'
    found = gauges.series(page)
    assert gauges.total(found, "x") == 7.5
    assert gauges.total(found, "x", a="1", b="{2}") == 3
    assert gauges.total(found, "z") == 0


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 16}}, 16),
        ({"prompt_tokens_details": {"cached_tokens": None}}, 0),
        ({"prompt_tokens_details": None, "prompt_tokens": 9}, 0),  # SGLang, when nothing was
        ({}, None),
    ],
)
def test_what_is_reported_cached(usage: dict[str, object], cached: int | None) -> None:
    assert cached_tokens(usage) == cached


def test_cards_are_read_and_counted() -> None:
    listing = (
        "0, NVIDIA H200, 143771, 4, 580.159.04\n"
        "1, NVIDIA H200, 143771, 0, 580.159.04\n"
        "2, [Unknown Error], [N/A], [N/A], [N/A]\n"
    )
    cards = machine.read_gpus(listing)
    assert [card.used_mib for card in cards] == [4, 0]
    assert machine.described(cards) == "2 x NVIDIA H200, 143771 MiB each; driver 580.159.04"
    assert machine.described([]) == machine.NO_GPU


def test_memory_is_that_of_the_cards_that_the_manager_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may fill the others meanwhile."""
    program = tmp_path / "nvidia-smi"
    rows = "".join(f"{at}, NVIDIA H200, 143771, {10**at}, 580.1\n" for at in range(4))
    program.write_text(f"#!/bin/sh\nprintf '%s' '{rows}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.used_mib() == 1111
    assert machine.used_mib(machine.named("0, 2-3")) == 1101
    assert machine.used_mib(machine.named("auto")) == 1111
    assert machine.named("GPU-8932f937") == machine.named("") == frozenset()


def test_every_report_tells_the_cards_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the floors, too: a card that is hidden must not be planned with."""
    program = tmp_path / "nvidia-smi"
    rows = "".join(f"{at}, NVIDIA H200, 143771, 0, 580.1\n" for at in range(4))
    program.write_text(f"#!/bin/sh\nprintf '%s' '{rows}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    told = machine.this_machine()
    assert (told.hardware, told.driver) == ("2 x NVIDIA H200", "580.1")
    assert machine.header(machine.gpus())["hardware"].startswith("2 x NVIDIA H200")
    assert machine.Machine().hardware.startswith(machine.NO_GPU)


def test_the_phases_of_a_start_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "m-0.log"
    log.write_text(
        "INFO [gpu_model_runner.py] Model loading took 15.27 GiB memory and 1.400000 seconds\n"
        "INFO [monitor.py] torch.compile took 4.41 s in total\n"
        "INFO [gpu_model_runner.py] Graph capturing finished in 4 secs, took 0.61 GiB\n"
        "INFO [core.py] init engine (profile, create kv cache, warmup model) took 9.95 seconds\n"
    )
    assert serving.phases(log) == {
        "weights_s": 1.4,
        "compile_s": 4.41,
        "graphs_s": 4.0,
        "engine_init_s": 9.95,
    }
    log.write_text(
        "[2026-01-01 TP0] Load weight end. elapsed=0.31 s, type=Qwen3ForCausalLM, avail mem=1 GB\n"
        "[2026-01-01 TP0] Capture prefill CUDA graph end. elapsed=10.50 s, mem usage=0.9 GB\n"
        "[2026-01-01 TP0] Capture decode CUDA graph end. elapsed=4.50 s, mem usage=0.8 GB\n"
    )
    assert serving.phases(log) == {"weights_s": 0.31, "graphs_s": 15.0}
    assert serving.phases(tmp_path / "none") == {}


# --- KV events ------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["vllm-0.33.0", "sglang-0.5.23"])
async def test_events_of_both_engines_are_read(release: str) -> None:
    recorded = json.loads((GOLDEN / f"{release}-kv-events.json").read_text())["hex"]
    listener = Listener(Source("tcp://127.0.0.1:1", "", "a test"))
    try:
        listener.hear([b"kv", bytes(8), bytes.fromhex(recorded)], 1.25)
        told = listener.told
        assert (told.batches, told.holes, told.unread) == (1, 0, 0)
        assert (told.stored, told.removed, told.cleared, told.blocks) == (1, 1, 1, {})
        assert told.lags_s == [0.25]
    finally:
        await listener.close()


async def test_what_older_releases_tell_is_read_and_holes_are_seen() -> None:
    listener = Listener(Source("tcp://127.0.0.1:1", "", "a test"))
    try:
        stored = ["BlockStored", [-13, 14], None, [1] * 64, 32, None, "GPU"]
        for number, events in ((7, [stored]), (8, [["BlockRemoved", [14]]]), (10, [])):
            batch = msgspec.msgpack.encode([1.0, events, None])
            listener.hear([b"kv", number.to_bytes(8, "big"), batch], 1.0)
        listener.hear([b"kv", b"", b"?"], 2.0)
        told = listener.told
        assert (told.batches, told.holes, told.unread, told.blocks) == (3, 1, 1, {-13: 32})
    finally:
        await listener.close()


class _Engine:
    """Answers GET from a table."""

    def __init__(self, pages: dict[str, object]) -> None:
        self._pages = pages

    async def get(self, path: str) -> SimpleNamespace:
        page = self._pages.get(path)
        status = 404 if page is None else 200
        return SimpleNamespace(status=status, body=json.dumps(page).encode())


_FLAGS = '{"enable_kv_cache_events":true,"endpoint":"tcp://*:5600","topic":"kv"}'


@pytest.mark.parametrize(
    ("record", "pages", "command", "endpoint", "told_by"),
    [
        (
            {"kv_events": "tcp://127.0.0.1:1", "kv_topic": "t"},
            {},
            "",
            "tcp://127.0.0.1:1",
            "the manager",
        ),
        (
            {},
            {"/kv_event_sources": {"0": {"endpoint": "tcp://0.0.0.0:2", "topic": None}}},
            "",
            "tcp://127.0.0.1:2",
            "/kv_event_sources",
        ),
        (
            {},
            {"/server_info": {"kv_events": {"endpoint_port_base": 3, "topic": ""}}},
            "",
            "tcp://127.0.0.1:3",
            "/server_info",
        ),
        (
            {},
            {"/server_info": {"kv_events": None}},
            f"python vllm serve m --kv-events-config {_FLAGS} --seed 0",
            "tcp://127.0.0.1:5600",
            "its flags",
        ),
    ],
)
async def test_where_events_are_is_asked_of_whoever_knows(
    record: dict[str, str], pages: dict[str, object], command: str, endpoint: str, told_by: str
) -> None:
    engine = cast("Client", _Engine(pages))
    source = await find_source(engine, Replica(**record), ["python -m backends.cli up", command])
    assert source is not None
    assert (source.endpoint, source.told_by) == (endpoint, told_by)


async def test_nobody_may_know_where_events_are() -> None:
    assert await find_source(cast("Client", _Engine({})), Replica(), ["vllm serve m"]) is None


def test_a_bound_address_is_one_of_this_machine() -> None:
    assert here("tcp://*:5557") == "tcp://127.0.0.1:5557"
    assert here("tcp://0.0.0.0:5557") == "tcp://127.0.0.1:5557"
    assert here("tcp://10.0.0.1:5557") == "tcp://10.0.0.1:5557"


# --- leaving --------------------------------------------------------------------------------------


async def test_idle_counts_only_after_the_engine_was_seen_busy() -> None:
    rest = EngineLoad(kv_used_ratio=0.001, kv_capacity_tokens=100_000)
    readings = [
        rest,  # of the time before the request
        msgspec.structs.replace(rest, kv_used_ratio=0.08),  # a piece of its prompt is computed
        msgspec.structs.replace(rest, running=1),
        rest,
    ]

    async def read() -> EngineLoad:
        return readings.pop(0)

    scene = cast("Scene", SimpleNamespace(gauge=SimpleNamespace(read=read)))
    watch = Watch(scene, rest)
    assert not await watch.busy()
    assert not watch.seen_busy
    assert await watch.busy()
    assert watch.seen_busy
    assert await watch.busy()
    assert not await watch.busy()
    assert watch.seen_busy


# --- predictions ----------------------------------------------------------------------------------


def test_prompts_that_share_nothing_do_not_flatter_the_median() -> None:
    fresh = [Guess(kind=FRESH, prompt_tokens=100, predicted=0, reported=0)] * 9
    heads = [
        Guess(kind=HEAD, prompt_tokens=1000, predicted=500 + off, reported=500)
        for off in (-100, 20, 40)
    ]
    found = caching.judged([*fresh, *heads])
    assert found["median_error_percent"] == pytest.approx(4.0)
    assert found["mean_signed_error_percent"] == pytest.approx(-4 / 3)
    lines = caching.table([*fresh, *heads]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["fresh", "shared"]


def test_the_mix_of_kinds_is_fixed_and_its_order_drawn() -> None:
    one, other = (caching.drawn_kinds(60, random.Random(seed)) for seed in (1, 2))
    assert one != other
    assert sorted(one) == sorted(other)
    assert one.count(FRESH) == 12


# --- cost -----------------------------------------------------------------------------------------


def test_a_difference_is_found_and_noise_is_not_taken_for_one() -> None:
    draw = random.Random(3)

    def arm(more: float) -> list[list[float]]:
        return [[20 + draw.gauss(0, 0.2) + more] for _ in range(300)]

    found = paired.compare(arm(0), arm(0), arm(1.5), random.Random(1))
    assert found.p50.value == pytest.approx(1.5, abs=0.1)
    assert found.p50.low < 1.5 < found.p50.high
    assert found.paired_p50 == pytest.approx(1.5, abs=0.1)
    assert abs(found.control_p50) < 0.1
    assert found.samples == 300


@pytest.mark.parametrize(
    ("low", "value", "high", "control", "samples", "verdict"),
    [
        (0.5, 0.8, 1.0, 0.1, 100, Judgement.KEPT),
        (0.5, 0.8, 1.1, 0.1, 100, Judgement.UNDECIDED),  # though the value itself is within
        (0.8, 1.4, 1.9, 0.1, 100, Judgement.UNDECIDED),
        (1.1, 1.4, 1.9, 0.1, 100, Judgement.BROKEN),
        (1.1, 1.4, 1.9, -0.5, 100, Judgement.UNDECIDED),  # the control is as far off
        (-9.0, -4.0, 0.9, 6.0, 100, Judgement.UNDECIDED),
        (7.0, 8.0, 9.0, 0.0, 19, Judgement.TOO_FEW),
    ],
)
def test_a_promise_is_judged_by_its_interval_and_beside_its_noise(
    low: float, value: float, high: float, control: float, samples: int, verdict: Judgement
) -> None:
    found = Difference(value=value, low=low, high=high)
    assert paired.judge(found, control, 1.0, samples, 20) is verdict


def _comparison(low: float, high: float) -> Comparison:
    p50 = Difference(value=(low + high) / 2, low=low, high=high)
    return Comparison(
        samples=200, p50_direct=5.0, p99_direct=6.0, p50=p50,
        p99=Difference(value=0.0, low=-0.1, high=0.1), paired_p50=0.0, control_p50=0.0,
        control_p99=0.0, control_paired_p50=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pooled", "verdict", "told"),
    [
        ((0.1, 0.9), Verdict.PASS, ()),
        ((0.1, 1.1), Verdict.NOT_RUN, ("+0.600 ms [0.100, 1.100], within 1: UNDECIDED",)),
        ((1.1, 1.3), Verdict.FAIL, ("+1.200 ms [1.100, 1.300], within 1: BROKEN",)),
    ],
)
async def test_the_cost_is_judged_by_all_sizes_together(
    pooled: tuple[float, float], verdict: Verdict, told: tuple[str, ...]
) -> None:
    result = {
        ("32 tokens x 1", cost.FIRST): _comparison(2.0, 3.0),  # one cell decides nothing
        ("64 tokens x 1", cost.FIRST): _comparison(-9.0, 9.0),
        ("all sizes x 1", cost.FIRST): _comparison(*pooled),
        ("all sizes x 8", cost.GAP): _comparison(0.0, 0.1),
    }

    async def work(found: Findings) -> None:
        found.table = cost.shown(result)
        cost.conclude(result, found)

    step = Step(name="cost", run=work, usual_s=1.0)
    (found,) = await run_steps([step], 0.0, lambda _: None)
    assert found.verdict is verdict
    assert found.figures == {"single_cells_beyond": 1}
    assert found.broken == tuple(f"all sizes x 1, first token: p50 {text}" for text in told)
    rows = [line for line in found.table.splitlines() if " x " in line]
    assert [
        line.endswith(end) for line, end in zip(rows, ("BROKEN", "p50 UNDECIDED"), strict=False)
    ]
    assert rows[0].split()[6:8] == ["200", "5.000"]
    assert rows[2].split()[6:9] == ["200", "-", "+6.000"]  # relative: its zero is the median


def test_every_round_has_every_arm_and_crowds_count_their_streams() -> None:
    options = CostOptions(sizes=(32, 64), concurrencies=(1, 4), pairs=8)
    rounds = cost.plan(options, random.Random(1))
    asked = [(cell, arm) for due in rounds for cell, arm in due]
    assert asked.count((Cell(32, 1), "direct")) == asked.count((Cell(64, 1), "proxied")) == 8
    assert asked.count((Cell(32, 4), "again")) == 2
    assert rounds[0] != rounds[4]


def test_the_arrival_of_every_token_is_kept() -> None:
    reader = GapReader()
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    event = b'data: {"choices":[{"text":"a"}]}\n\n'
    reader.feed(head, 1.0)
    for at_s, count in ((2.0, 1), (3.0, 2)):
        body = event * count
        reader.feed(b"%x\r\n%b\r\n" % (len(body), body), at_s)
    assert reader.at_s == [2.0, 3.0, 3.0]


def test_sizes_put_together_do_not_spread_by_their_differences() -> None:
    small, large = Cell(32, 1), Cell(8192, 1)
    table = {
        cell: {
            arm: cost.Samples(first=[[base + (arm == "proxied")]] * 30, gaps=[[5.0]] * 30)
            for arm in cost.ARMS
        }
        for cell, base in ((small, 20.0), (large, 200.0))
    }
    found = cost.compared(table, random.Random(1))
    together = found["all sizes x 1", cost.FIRST]
    assert together.p50.value == together.p99.value == pytest.approx(1.0)
    assert found[large.name, cost.FIRST].p50_direct == 200.0
    judged = cost.judgements(found)
    assert judged[small.name, cost.FIRST] == (Judgement.KEPT, Judgement.TOO_FEW)
    assert "32 tokens x 1, first token" in cost.shown(found)
