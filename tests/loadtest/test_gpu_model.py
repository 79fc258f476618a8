"""Fitting a profile to a run: what is known comes out again, by the simulator's own arithmetic."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulator import profiles
from backends.simulator.clockwork import Clockwork, Limits, Sequence
from backends.simulator.flags import parse_flags
from backends.simulator.kv_cache import KvCache
from backends.simulator.tally import Tally
from backends.simulator.tokens import WordSource, pack_ids
from loadtest.__main__ import main
from loadtest.gpu import fit, model
from loadtest.gpu.model import FitError, Profile, Prompt
from loadtest.gpu.records import Decode, FirstToken, read_recording

LAWS = settings(derandomize=True, max_examples=40, deadline=None)
RESULTS = Path(__file__).parents[2] / "loadtest" / "results"
VLLM = str(RESULTS / "speeds-h200-vllm-0.26.0.json")
VLLM_WHOLE = str(RESULTS / "speeds-h200-vllm.json")  # by `gpu speeds` itself: every size and batch
SGLANG = str(RESULTS / "speeds-h200-sglang.json")
SIZES = (128, 512, 1024, 2048, 4096, 8192, 16_384, 32_000)


def prompt(tokens: int, cached: int = 0, first_s: float = 1.0, kind: str = "cold") -> Prompt:
    return Prompt(tokens=tokens, cached_tokens=cached, first_s=first_s, kind=kind)


def profile_of(**fields: float) -> Profile:
    base: dict[str, object] = {
        "name": "test",
        "intake_s": 6e-3,
        "intake_s_per_token": 1e-6,
        "prefill_s_per_token": 21e-6,
        "prefill_s_per_token_squared": 5e-10,
        "prefill_floor_s": 9e-3,
        "decode_base_s": ((1, 5e-3), (8, 5.5e-3)),
        "decode_s_per_context_token": 3e-8,
        "kv_cache_tokens": 300_000,
    }
    return msgspec.convert(base | fields, Profile)


def all_prompts() -> list[Prompt]:
    cached = [prompt(size, size - 16, kind="cached") for size in SIZES]
    tails = [prompt(size, size - 208, kind="tail") for size in SIZES[2:]]
    return [prompt(size) for size in SIZES] + cached + tails


@LAWS
@given(
    st.floats(1e-3, 2e-2), st.floats(0, 2e-6), st.floats(4e-3, 2e-2),
    st.floats(5e-6, 4e-5), st.floats(1e-10, 1e-9),
)  # fmt: skip
def test_a_run_that_obeys_the_model_gives_its_constants_back(
    intake: float, per_token: float, floor: float, linear: float, attention: float
) -> None:
    truth = profile_of(
        intake_s=intake,
        intake_s_per_token=per_token,
        prefill_floor_s=floor,
        prefill_s_per_token=linear,
        prefill_s_per_token_squared=attention,
    )
    seen = [
        prompt(
            each.tokens, each.cached_tokens, model.predicted_first_s(truth, each, 8192), each.kind
        )
        for each in all_prompts()
    ]
    found = model.fit_first_token(seen, 8192)
    again = profile_of(
        intake_s=found["intake"],
        intake_s_per_token=found["intake_per_token"],
        prefill_floor_s=found["floor"],
        prefill_s_per_token=found["linear"],
        prefill_s_per_token_squared=found["attention"],
    )
    for each in seen:
        assert model.predicted_first_s(again, each, 8192) == pytest.approx(each.first_s, rel=0.02)


def test_the_farthest_promised_figure_is_nearer_than_by_least_squares() -> None:
    truth = profile_of()
    seen = []
    for index, each in enumerate(all_prompts()):
        bent = 1.25 if each.tokens == 4096 else 1 + 0.04 * (-1) ** index
        first_s = model.predicted_first_s(truth, each, 8192) * bent
        seen.append(msgspec.structs.replace(each, first_s=first_s))
    promised = [fit.is_promised(each.tokens, each.kind) for each in seen]

    def farthest(constants: dict[str, float]) -> float:
        return max(
            abs(model.first_s(constants, each, 8192) / each.first_s - 1)
            for each, counts in zip(seen, promised, strict=True)
            if counts
        )

    squares = farthest(model.fit_first_token(seen, 8192))
    closest = farthest(model.closest_first_token(seen, 8192, promised))
    assert closest < 0.85 * squares
    # What nobody promised may be as far off as it likes.
    nothing = model.closest_first_token(seen, 8192, [False] * len(seen))
    assert nothing == model.fit_first_token(seen, 8192)


def test_bases_grow_with_the_batch_and_context_costs_what_it_cost() -> None:
    rows = [
        Decode(batch=batch, context_tokens=context, token_ms=base + batch * context * 3e-5)
        for batch, base in ((1, 5.0), (8, 5.4), (32, 5.3))
        for context in (256, 8000)
    ]
    table, context_s = model.fit_decode(rows)
    assert context_s == pytest.approx(3e-8)
    assert [base for _, base in table] == pytest.approx([5e-3, 5.4e-3, 5.4e-3])


@pytest.mark.parametrize(
    "rows",
    [
        [Decode(batch=1, context_tokens=256, token_ms=5.0)],
        [Decode(batch=batch, context_tokens=256, token_ms=5.0) for batch in (1, 8)],
        [Decode(batch=1, context_tokens=context, token_ms=5.0) for context in (256, 8000)],
    ],
)
def test_decode_that_tells_nothing_apart_is_refused(rows: list[Decode]) -> None:
    with pytest.raises(FitError, match="two batches or more"):
        model.fit_decode(rows)


def test_cold_prompts_alone_are_refused() -> None:
    with pytest.raises(FitError, match="cached"):
        model.fit_first_token([prompt(size) for size in SIZES], 8192)


def test_no_value_is_negative_and_the_errors_are_relative() -> None:
    # Without the bound the second value would be -1.
    assert model.non_negative([(1, 0), (1, 1)], [2, 1]) == pytest.approx([1.2, 0])
    # (x/1 - 1)^2 + (x/2 - 1)^2 is least at 1.2; absolute errors would say 1.5.
    assert model.non_negative([(1,), (1,)], [1, 2]) == pytest.approx([1.2])


@pytest.mark.parametrize("name", ["h200-8b", "h200-8b-sglang", "h200-8b-vllm"])
@pytest.mark.parametrize(
    ("tokens", "cached"), [(128, 0), (2048, 0), (32_000, 0), (8192, 8176), (32_000, 31_792)]
)
def test_the_arithmetic_is_the_simulators(name: str, tokens: int, cached: int) -> None:
    profile = profiles.PROFILES[name]
    engine = Clockwork(profile, KvCache(30_000, 16), Limits(1024, 8192, 200_000), Tally())
    now_s = 0.0
    for ids in (range(cached), range(tokens)):
        if not ids:
            continue
        octets = pack_ids(ids)
        begun_s = now_s
        engine.submit(Sequence(octets, max_tokens=1, words=WordSource(octets, 0)), now_s)
        while (start_s := engine.next_ready_s(now_s)) is not None:
            step = engine.plan(start_s)
            assert step is not None
            now_s = step.end_s
            engine.finish(step)
    ours = msgspec.convert(msgspec.to_builtins(profile), Profile)
    predicted_s = model.predicted_first_s(ours, prompt(tokens, cached), 8192)
    assert now_s - begun_s == pytest.approx(predicted_s)
    batch, base_s = profile.decode_base_s[-1]
    step_s = profile.step_s(batch, batch * 1000, [])
    assert step_s == pytest.approx(model.predicted_token_s(ours, batch, 1000))
    assert step_s > base_s


@pytest.mark.parametrize(
    ("recording", "name", "share"),
    [
        (VLLM, "h200-8b", 0.15),
        (VLLM_WHOLE, "h200-8b-vllm", 0.15),
        (SGLANG, "h200-8b-sglang", 0.15),
    ],
)
def test_shipped_profiles_are_close_to_their_recordings(
    recording: str, name: str, share: float
) -> None:
    ours = msgspec.convert(msgspec.to_builtins(profiles.PROFILES[name]), Profile)
    rows = fit.predicted_rows(read_recording(recording), ours)
    assert len([row for row in rows if row.promised]) >= 11
    assert {
        row.what: row.ratio for row in rows if row.promised and abs(row.ratio - 1) > share
    } == {}


def test_a_fitted_file_is_a_profile_of_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.json"
    shipped = str(resources.files("backends.simulator") / "measured" / "h200-8b.json")
    command = ["gpu", "fit", VLLM, "--name", "made", "--like", shipped, "--out", str(out)]
    assert main(command) == 0
    profile = profiles.parse_profile(out.read_bytes())
    assert parse_flags(["--profile", str(out)]).profile == profile
    assert (profile.name, profile.sleep_first_s, profile.kv_cache_tokens) == ("made", 10.9, 336_064)
    assert "vllm 0.26.0" in profile.source
    rows = fit.predicted_rows(
        read_recording(VLLM), msgspec.json.decode(out.read_bytes(), type=Profile)
    )
    assert max(abs(row.ratio - 1) for row in rows if row.promised) < model.NEAR_SHARE
    assert max(abs(row.ratio - 1) for row in rows) < 0.12
    assert "seen before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "expected what `gpu speeds --json` wrote"),
        ('{"engine":"vllm","version":"1","gpu":"x","model":"m"}', "needs cold prompts"),
    ],
)
def test_what_is_no_recording_is_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recording.json"
    file.write_text(text)
    assert main(["gpu", "fit", str(file), "--name", "x"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_partly_seen_prompts_start_at_a_whole_block() -> None:
    row = FirstToken(prompt_tokens=1000, cold_ms=30, cached_ms=12, tail_ms=14)
    starts = {each.kind: each.cached_tokens for each in model.prompts_of([row])}
    assert starts == {"cold": 0, "cached": 992, "tail": 800}
    assert model.chunks_of(prompt(20_000, 1000), 8192) == [
        (1000, 9192), (9192, 17_384), (17_384, 20_000),
    ]  # fmt: skip
