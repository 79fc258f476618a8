"""Measurements of engines: what is computed from what was seen, and each command on the simulator.

The runs on the simulator show that commands work and write what others read; their times are a
busy machine's and are not judged here.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from loadtest.__main__ import main
from loadtest.gpu import (
    abreast,
    fidelity,
    fit,
    floors,
    measuring,
    paths,
    predictions,
    probing,
    records,
)
from loadtest.gpu.direct import (
    EngineOptions,
    engine_command,
    environment,
    read_chunk_tokens,
    read_phases,
    words_for,
)
from loadtest.gpu.paths import Finding, Trial
from loadtest.gpu.predictions import Configuration, Constant, Outlook, OutlookError, Prediction, Row
from loadtest.gpu.probing import Answer, steady
from loadtest.gpu.records import Decode, FirstToken, Recording
from loadtest.gpu.speculation import Speculation, read_speculation, weights_gb
from loadtest.run import RunError

GOLDEN = Path(__file__).parents[1] / "golden"
RESULTS = Path(__file__).parents[2] / "loadtest" / "results"
FAST = ["--rehearse", "--args", "--profile fast --drain-poll-seconds 0.1"]


def answer(begin_s: float, step_s: float, events: int, tokens: int = 0) -> Answer:
    times_s = [begin_s + step_s * index for index in range(events)]
    return Answer(begin_s - 0.1, times_s, tokens or events, 0)


def test_time_per_token_is_taken_while_all_answers_are_under_way() -> None:
    # The first is twice as quick before the second begins, at 1.0 s.
    early = [*(0.01 * index for index in range(100)), *(1.0 + 0.02 * index for index in range(50))]
    together = [Answer(-0.1, early, 150, 0), answer(1.0, 0.02, 40)]
    rate_s, length = steady(together)
    assert rate_s == pytest.approx(0.02)
    assert 60 < length < 80  # of 120 and 20 tokens on average


def test_events_of_several_tokens_count_as_those() -> None:
    rate_s, _ = steady([answer(0.0, 0.02, 40, tokens=80)])
    assert rate_s == pytest.approx(0.01)


def test_answers_that_hardly_overlap_say_nothing() -> None:
    with pytest.raises(RunError, match="longer answers"):
        steady([answer(0.0, 0.01, 50), answer(0.45, 0.01, 50)])


@pytest.mark.parametrize(
    ("metrics", "tokens"),
    [("vllm-0.26.0-metrics.txt", 336_064), ("sglang-0.5.17-metrics.txt", 343_968)],
)
def test_the_kv_cache_is_as_large_as_the_engine_says(metrics: str, tokens: int) -> None:
    assert probing.read_kv_pool((GOLDEN / metrics).read_text()) == tokens
    assert probing.read_kv_pool("") == 0


def test_a_batch_that_the_kv_cache_does_not_hold_is_left_out() -> None:
    assert probing.fits(32, 8200, 336_064)
    assert not probing.fits(64, 8200, 336_064)
    assert probing.fits(64, 8200, 0)  # unknown


def test_longer_intakes_get_longer_answers() -> None:
    lengths = [measuring.answer_length(192, batch, 8000) for batch in (1, 8, 64)]
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0] + 64
    assert measuring.answer_length(192, 1, 128) == 192


def test_medians_and_spread_of_repeats() -> None:
    row = records.first_token(1024, [0.03, 0.05, 0.04], [0.01], [], 1008)
    assert (row.cold_ms, row.cached_ms, row.tail_ms) == (40.0, 10.0, None)
    assert row.times() == {"cold": 40.0, "cached": 10.0}
    assert row.spread_ms == pytest.approx(20.0)


def test_a_report_names_what_was_not_run() -> None:
    recording = Recording(
        engine="vllm",
        version="1",
        gpu="card",
        model="m",
        first_token=(FirstToken(prompt_tokens=1024, cold_ms=1240.4),),
        decode=(Decode(batch=2, context_tokens=256, token_ms=5.0),),
        left_out=("decode at batch 64, context 8,000: the time was up",),
    )
    lines = records.shown(recording).splitlines()
    assert [line.split() for line in lines if line.startswith("1,024")] == [
        ["1,024", "1,240", "-", "-", "0", "0", "0.00"]
    ]
    assert ["2", "256", "5.00", "400"] in [line.split() for line in lines]
    assert lines[-1].startswith("NOT RUN: decode at batch 64")


def test_phases_come_when_they_are_first_seen() -> None:
    log = "noise\n\x1b[1mmodel loading took 15.27 GiB\x1b[0m\n"
    first = read_phases(log, 10.04, ())
    later = read_phases(f"{log}Capture: 40%|##\nGraph capturing finished in 4 secs\n", 20.0, first)
    assert [(phase.at_s, phase.text) for phase in later] == [
        (10.0, "model loading took 15.27 GiB"),
        (20.0, "Graph capturing finished in 4 secs"),
    ]


@pytest.mark.parametrize(
    ("log", "tokens"),
    [
        ("max_total_num_tokens=343968, chunked_prefill_size=4096, max_prefill_tokens=16384", 4096),
        ("Chunked prefill is enabled with max_num_batched_tokens=16384.", 16_384),
        ("server_args=ServerArgs(chunked_prefill_size=None)", 8192),
    ],
)
def test_the_tokens_of_a_step_are_read_from_the_log(log: str, tokens: int) -> None:
    assert read_chunk_tokens(log) == tokens


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            "vllm",
            "serve /m --host 127.0.0.1 --port 7 --served-model-name m --load-format dummy "
            "--quantization fp8 "
            "--compilation-config.pass_config.fuse_allreduce_rms=false --max-model-len 40960 "
            "--tensor-parallel-size 2 "
            "--enable-prefix-caching --enable-prompt-tokens-details --seed 0 --more 1",
        ),
        (
            "sglang",
            "serve --model-path /m --host 127.0.0.1 --port 7 --served-model-name m "
            "--load-format dummy --quantization fp8 "
            "--enforce-disable-flashinfer-allreduce-fusion --context-length 40960 --tp-size 2 "
            "--page-size 16 --enable-metrics --enable-cache-report --random-seed 0 --more 1",
        ),
    ],
)
def test_engines_are_started_by_their_own_command(
    engine: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / engine
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    options = EngineOptions(
        engine=engine, model_path="/m", tensor_parallel=2, quantization="fp8",
        args=("--more", "1"), devices="3,4",
    )  # fmt: skip
    assert engine_command(options, 7) == [str(script), *words.split()]
    variables = environment(options)
    assert variables["CUDA_VISIBLE_DEVICES"] == "3,4"
    # Cards that work together leave the switch's multicast alone.
    assert (variables["NCCL_NVLS_ENABLE"], variables["VLLM_ALLREDUCE_USE_SYMM_MEM"]) == ("0", "0")
    assert "NCCL_NVLS_ENABLE" not in environment(EngineOptions(engine=engine))


def test_an_engine_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match="no command 'sglang' on PATH"):
        engine_command(EngineOptions(engine="sglang", model_path="/m"), 7)


def test_words_go_to_the_engine_that_is_named() -> None:
    given = ["--both 1", "vllm=--kv-cache-memory-bytes 4G", "sglang=--attention-backend fa3"]
    assert words_for("vllm", given) == ["--both", "1", "--kv-cache-memory-bytes", "4G"]
    assert words_for("sglang", given) == ["--both", "1", "--attention-backend", "fa3"]
    assert words_for("vllm", ["--quantization=fp8"]) == ["--quantization=fp8"]


def prediction(engine: str, tp: int, weights: str, expected_ms: float) -> Prediction:
    return Prediction(
        engine=engine, tp=tp, weights=weights, floor_ms=3.4, expected_ms=expected_ms,
        overhead_ms=2.0,
    )  # fmt: skip


def outlook() -> Outlook:
    return Outlook(
        predictions=[
            prediction("vllm", 1, "bf16", 5.0),
            prediction("vllm", 1, "fp8", 4.0),
            prediction("sglang", 1, "bf16", 5.0),
        ],
        calibration={"vllm": Constant("layer_s", 50e-6)},
    )


def row(engine: str, weights: str, token_ms: float) -> Row:
    return Row(configuration=Configuration(engine, 1, weights), version="9", token_ms=token_ms)


def test_one_constant_is_fitted_to_relative_errors() -> None:
    # Twice the constant's share is right for both: 3 + 4 and 2 + 4.
    rows = [row("vllm", "bf16", 7.0), row("vllm", "fp8", 6.0)]
    assert predictions.refit("vllm", rows, outlook()) == pytest.approx(2.0)
    assert predictions.refit("sglang", rows, outlook()) is None
    # Between the two, nearer to the one whose relative error would be larger.
    rows = [row("vllm", "bf16", 7.0), row("vllm", "fp8", 4.0)]
    factor = predictions.refit("vllm", rows, outlook())
    assert factor is not None
    assert 1.0 < factor < 1.5
    assert predictions.refit("vllm", [row("vllm", "bf16", 1.0)], outlook()) == 0.0


@pytest.mark.parametrize(
    ("rows", "kept", "said"),
    [
        ([row("vllm", "bf16", 7.0), row("vllm", "fp8", 6.0)], True, "layer_s 5e-05, refitted 0.00"),
        ([row("vllm", "bf16", 9.0), row("vllm", "fp8", 3.0)], False, "FAIL: 2 predictions"),
        ([row("sglang", "bf16", 5.5)], True, "sglang: its constant times 1.250"),
        ([predictions.not_run(Configuration("vllm", 4, "bf16"), "needs 4 GPUs, here are 2")],
         False, "NOT RUN: vllm TP4 bf16: needs 4 GPUs, here are 2"),
        ([row("vllm", "bf16", 5.0), predictions.failed(Configuration("vllm", 2, "bf16"), "died")],
         False, "FAIL: vllm TP2 bf16: died"),
    ],
)  # fmt: skip
def test_the_planners_promise_is_judged_after_the_fit(
    rows: list[Row], kept: bool, said: str
) -> None:
    text, found = predictions.report({"date": "today"}, rows, outlook())
    assert found is kept
    assert said in text


def test_configurations_share_the_cards_that_there_are() -> None:
    wanted = [
        Configuration(engine, tp, weights)
        for engine in ("vllm", "sglang")
        for tp in (1, 2, 4)
        for weights in ("bf16", "fp8")
    ]
    runnable, missing = predictions.that_fit(wanted, 2)
    assert {each.configuration.tensor_parallel for each in missing} == {4}
    found = predictions.waves(runnable, 2)
    assert [len(wave) for wave in found] == [2, 1, 1, 2, 1, 1]
    for wave in found:
        assert sum(each.tensor_parallel for each in wave) <= 2
        assert len({each.engine for each in wave}) == 1
    assert sorted(each.text for wave in found for each in wave) == sorted(
        each.text for each in runnable
    )


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("NVIDIA H100 80GB HBM3",), "h100"),
        (("NVIDIA H200", "NVIDIA H200"), "h200"),
        (("NVIDIA GB200",), "gb200"),
        (("NVIDIA A100-SXM4-80GB",), "a100"),
        (("Tesla T4",), ""),
        ((), ""),
    ],
)
def test_cards_have_the_planners_names(names: tuple[str, ...], kind: str) -> None:
    assert predictions.gpu_type(names) == kind


def test_a_plan_without_predictions_is_refused() -> None:
    with pytest.raises(OutlookError, match="expected what `doherty plan --json` says"):
        predictions.read_outlook(b"{}")


def test_rows_come_from_whatever_measured_single_answers(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    found = [finding("fp8", token_ms=4.0, version="9"), finding("eagle3", token_ms=7.0)]
    file.write_bytes(msgspec.json.encode({"findings": found, "facts": {}}))
    rows = predictions.read_rows(str(file))
    assert [(row.configuration.text, row.token_ms) for row in rows] == [("vllm TP1 fp8", 4.0)]
    recording = RESULTS / "speeds-h200-sglang.json"
    rows = predictions.read_rows(str(recording))
    assert [(row.configuration.text, row.token_ms) for row in rows] == [("sglang TP1 bf16", 5.01)]
    file.write_text("{}")
    with pytest.raises(OutlookError, match="wrote as --json"):
        predictions.read_rows(str(file))


def test_vllm_counts_its_drafts() -> None:
    page = (
        'vllm:spec_decode_num_drafts_total{engine="0"} 50.0\n'
        'vllm:spec_decode_num_draft_tokens_total{engine="0"} 150.0\n'
        'vllm:spec_decode_num_accepted_tokens_total{engine="0"} 5.0\n'
    )
    found = read_speculation(page, "")
    assert (found.draft_tokens, found.accepted_tokens) == (150.0, 5.0)
    assert found.accept_length == pytest.approx(1.1)
    assert found.drafted


def test_sglang_shows_an_acceptance_length_in_its_metrics_or_its_log() -> None:
    page = 'sglang:spec_accept_length{{tp_rank="0"}} {0}\nsglang:spec_num_draft_tokens {1}\n'
    found = read_speculation(page.format("1.0", "4.0"), "")
    assert (found.accept_length, found.draft_tokens, found.drafted) == (1.0, 4.0, True)
    page = page.format("0.0", "0.0")  # as it is without a draft model
    assert not read_speculation(page, "").drafted
    assert read_speculation(page, "accept len: 1.02, accept rate: 0.26").drafted


@pytest.mark.parametrize(
    ("log", "size"),
    [
        ("INFO [model_runner.py] Model loading took 8.60 GiB and 1.4 seconds", 8.6),
        ("Load weight end. elapsed=0.25 s, avail mem=123.82 GB, mem usage=15.31 GB.", 15.31),
        ("", 0.0),
    ],
)
def test_weights_are_as_large_as_the_log_says(log: str, size: float) -> None:
    assert weights_gb(log) == size


def finding(path: str, **fields: Any) -> Finding:
    base = {"chat_tokens": 32, "completion_tokens": paths.COMPLETION_TOKENS}
    return Finding(trial=Trial("vllm", path), **(base | fields))


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (finding("fp8"), True),
        (finding("fp8", completion_tokens=3), False),
        (finding("fp8", failure="died"), False),
        (finding("eagle3"), False),
        (finding("eagle3", rehearsed=True), True),
        (finding("eagle3", speculation=Speculation(draft_tokens=3, accept_length=1)), True),
        (finding("eagle3-fp8", speculation=Speculation()), False),
    ],
)
def test_a_path_passes_when_it_serves_and_drafts_if_it_should(found: Finding, passes: bool) -> None:
    assert paths.passed(found) is passes
    assert ("PASS" in paths.report({}, [found])) is passes


def test_a_comparison_fails_for_promised_figures_alone() -> None:
    recording = Recording(
        engine="vllm",
        version="1",
        gpu="card",
        model="m",
        first_token=(
            FirstToken(prompt_tokens=512, cold_ms=10.0),
            FirstToken(prompt_tokens=2048, cold_ms=50.0, cached_ms=10.0, tail_ms=10.0),
        ),
        decode=(
            Decode(batch=1, context_tokens=256, token_ms=5.0),
            Decode(batch=1, context_tokens=8064, token_ms=6.0),
            Decode(batch=128, context_tokens=256, token_ms=8.0),
        ),
    )
    measured = measuring.Measured(
        first_token=[
            FirstToken(prompt_tokens=512, cold_ms=40.0),
            FirstToken(prompt_tokens=2048, cold_ms=114.0, cached_ms=26.0, tail_ms=40.0),
        ],
        decode=[
            Decode(batch=1, context_tokens=224, token_ms=10.0),
            Decode(batch=1, context_tokens=8100, token_ms=12.0),
            Decode(batch=128, context_tokens=230, token_ms=32.0),
        ],
    )
    rows = fidelity.compared(recording, measured, slow=2.0)
    assert len(rows) == 7
    assert [each.what for each in fidelity.broken(rows)] == [
        "first token, 2,048 tokens seen before"
    ]
    assert rows[1].ratio == pytest.approx(1.14)
    told, kept = fidelity.verdict(rows, ())
    assert (told[:19], kept) == ("FAIL: 1 of 4 not wi", False)
    close = [each for each in rows if each not in fidelity.broken(rows)]
    assert fidelity.verdict(close, ()) == (
        "PASS: all 3 within 15%, the farthest 14.0% off", True,
    )  # fmt: skip
    told, kept = fidelity.verdict(close, ["decode at batch 64: the time was up"])
    assert told.endswith("14.0% off, but 1 could not be measured")
    assert not kept
    # Prompts of 512 tokens alone: all of their figures are in brackets.
    assert fidelity.verdict(rows[:1], ()) == ("FAIL: nothing that is promised was compared", False)
    plan = fidelity.plan_for(recording, 3, (), (1,), 1.0)
    assert (plan.prompts, plan.batches, plan.long_batches) == ((512, 2048), (1,), (1,))


def test_speeds_of_a_running_simulator_are_kept_for_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, text = tmp_path / "speeds.json", tmp_path / "speeds.txt"
    command = ["gpu", "speeds", "--engine", "sglang", "--quick", "--json", str(kept)]
    # At the speed of a GPU: of two answers of a few milliseconds one may be over before the other
    # has begun.
    real = ["--rehearse", "--args", "--profile h200-8b --drain-poll-seconds 0.1"]
    assert main([*command, "--out", str(text), *real]) == 0
    recording = records.read_recording(str(kept))
    assert recording.engine == "sglang (simulated)"
    assert [each.prompt_tokens for each in recording.first_token] == [512, 2048]
    assert recording.first_token[1].cached_tokens == 2032
    assert [each.batch for each in recording.decode] == [1, 2]
    assert recording.kv_cache_tokens == 336_064
    assert text.read_text() == capsys.readouterr().out
    assert fidelity.fit_dialect(recording.engine) == "sglang"
    # What the run measured is too little for a profile, and fit says so.
    assert main(["gpu", "fit", str(kept), "--name", "x"]) == 2


def test_an_engine_that_is_not_there_is_told_from_one_without_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert main(["gpu", "speeds", "--engine", "vllm", "--url", url]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "is the engine running there?" in said


def test_the_comparison_runs_and_says_what_it_found(tmp_path: Path) -> None:
    recording = Recording(
        engine="vllm",
        version="1",
        gpu="card",
        model="m",
        first_token=(FirstToken(prompt_tokens=1024, cold_ms=1e6, cached_ms=1e6),),
        decode=(),
    )
    file, rows = tmp_path / "recording.json", tmp_path / "rows.json"
    file.write_bytes(msgspec.json.encode(recording))
    command = ["gpu", "fidelity", str(file), "--profile", "fast", "--repeats", "1"]
    assert main([*command, "--json", str(rows)]) == 1  # 1 ms is not 1,000 s
    found = msgspec.json.decode(orjson.dumps(orjson.loads(rows.read_bytes())["rows"]),
                                type=list[fit.Row])  # fmt: skip
    assert [each.what for each in found] == [
        "first token, 1,024 tokens new", "first token, 1,024 tokens seen before",
    ]  # fmt: skip


def test_a_size_that_is_not_recorded_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    recording = str(RESULTS / "speeds-h200-sglang.json")
    command = ["gpu", "fidelity", recording, "--profile", "h200-8b-sglang"]
    assert main([*command, "--prompts", "2048,4000"]) == 2
    sizes = "128, 512, 1024, 2048, 4096, 8192, 16384, 32000"
    told = f"--prompts: 4000 is not recorded; there are {sizes}\n"
    assert capsys.readouterr().err == f"loadtest: {told}"
    assert main([*command, "--batches", "7"]) == 2
    told = "--batches: 7 is not recorded; there are 1, 2, 4, 8, 16, 32, 64"
    assert told in capsys.readouterr().err


def test_floors_are_rehearsed_and_earlier_rows_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, rows = tmp_path / "plan.json", tmp_path / "rows.json"
    plan.write_bytes(msgspec.json.encode({"decode": outlook()}))
    command = ["gpu", "floors", "--predictions", str(plan), "--gpus", "1", "--engines", "vllm"]
    command += ["--tp", "1,2", "--weights", "bf16", "--answer-tokens", "40", "--rehearse"]
    assert main([*command, "--json", str(rows)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("\n\nrehearsed: no verdict\n")
    assert "vllm 0.33.0 on no GPU" in said
    assert "NOT RUN: vllm TP2 bf16: needs 2 GPUs, here are 1" in said
    assert main([*command, "--measured", str(rows)]) == 0
    again = capsys.readouterr()
    assert "starting" not in again.err  # it is not measured again
    assert "vllm TP1 bf16" in again.out


def test_a_rehearsal_needs_no_cards_and_judges_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def one(each: Configuration, *_: object) -> Row:
        if each.tensor_parallel > 1:
            return predictions.failed(each, "died")
        return row("vllm", each.weights, 99.0)

    monkeypatch.setattr(floors, "_one", one)
    monkeypatch.setattr(abreast, "started", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(floors, "_plan", lambda *_: msgspec.json.encode({"decode": outlook()}))
    command = ["gpu", "floors", "--rehearse", "--engines", "vllm"]
    assert main([*command, "--tp", "1"]) == 0  # though 99 ms are far from what is predicted
    assert main([*command, "--tp", "1,4"]) == 1  # what does not start fails a rehearsal, too
    said = capsys.readouterr().out
    assert "NOT RUN" not in said
    assert "FAIL: vllm TP4 bf16: died" in said
    assert said.count("rehearsed: no verdict") == 2


def test_rows_are_kept_when_there_is_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    command = ["gpu", "floors", "--gpu", "h200", "--engines", "", "--json", str(rows)]
    command += ["--measured", str(RESULTS / "speeds-h200-vllm-0.26.0.json")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "no predictions: the planner needs --model-path; give --predictions" in said.err
    assert "nothing predicted for a GPU of type h200" in said.out
    assert "vllm: nothing to fit its constant to" in said.out
    assert predictions.read_rows(str(rows))[0].token_ms == 5.201
    assert main([*command, "--predictions", str(tmp_path / "none.json")]) == 2


def test_paths_are_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gpu", "paths", "--engines", "vllm", "--together", "2", *FAST]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("vllm")] == [
        ["vllm", "fp8"], ["vllm", "eagle3"],
    ]  # fmt: skip


def test_an_engine_that_ends_at_once_is_told_with_its_last_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["gpu", "speeds", "--rehearse", "--args=--no-such-flag", "--quick"]
    assert main(command) == 1
    assert "--no-such-flag" in capsys.readouterr().err


def test_eagle3_without_a_head_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "paths", "--model-path", "/m"]) == 2
    assert "--draft-path" in capsys.readouterr().err
