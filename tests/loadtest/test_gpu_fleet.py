"""The fleet run: what is decided without engines, and two cells in front of two simulators."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import msgspec
import pytest

from loadtest.__main__ import main
from loadtest.gpu.fleet import (
    ahead,
    engines,
    judge,
    lab,
    load,
    plan,
    planned,
    report,
    rivals,
    targets,
)
from loadtest.gpu.fleet.cell import check_length
from loadtest.gpu.fleet.engines import FleetOptions, Shape, command_of
from loadtest.gpu.fleet.record import (
    Burst,
    Capacity,
    CellKey,
    CellRecord,
    Record,
    RecordError,
    Row,
    Setting,
    Tokens,
    read,
)
from loadtest.gpu.surge import Load, arrivals
from loadtest.policies.engines import Flight
from loadtest.policies.workload import Job, Workload
from loadtest.policies.world import HELD
from loadtest.run import RunError
from loadtest.tiny_engine import TinyEngine
from loadtest.traces import Arrival, Trace, TraceError
from tests.fakes.programs import free_port

KEY = CellKey(workload="conversation", load=0.9, arm=plan.OURS)


def row(at_s: float, ttft_s: float, *, cached: int = 0, error: str = "") -> Row:
    return Row(at_s, ttft_s, 0.01, ttft_s + 0.1, 1000, cached, 11, error)


def cell(arm: str, ttfts_s: list[float], repeat: int = 0, **more: object) -> CellRecord:
    rows = [row(2.0 + place / 4, value) for place, value in enumerate(ttfts_s)]
    fields = {
        "key": CellKey(workload="conversation", load=0.9, arm=arm, repeat=repeat),
        "began": "now",
        "scale": 1.0,
        "seconds": 10.0,
        "warm_s": 2.0,
        "rows": rows,
        "engines": [Tokens(1000.0, 500.0, 10.0), Tokens(1000.0, 0.0, 10.0)],
        "router_s": 0.1,
    }
    return msgspec.convert({**fields, **more}, CellRecord, from_attributes=True)


# --- the record -----------------------------------------------------------------------------------


def test_a_record_cut_off_in_its_last_entry_goes_on_with_the_others(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.gz")
    record.add(cell(plan.OURS, [0.1]))
    whole = record.path.stat().st_size
    record.add(cell(plan.NGINX, [0.2]))
    octets = record.path.read_bytes()
    for end in (whole + 1, (whole + len(octets)) // 2, len(octets) - 1):
        record.path.write_bytes(octets[:end])
        assert Record(record.path).done() == {KEY}
    record.path.write_bytes(octets)
    assert len(read(record.path)) == 2


def test_what_is_added_behind_an_entry_that_was_cut_off_is_read(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.gz")
    record.add(cell(plan.OURS, [0.1]))
    record.add(cell(plan.NGINX, [0.2]))
    for end in (record.path.stat().st_size - 1, 1):
        record.path.write_bytes(record.path.read_bytes()[:end])
        again = Record(record.path)
        again.add(cell(plan.SGLANG, [0.3]))
        again.add(cell(plan.OURS_RR, [0.4]))
        assert [c.key.arm for c in Record(record.path).cells] == [c.key.arm for c in again.cells]
        assert again.cells[-2].key.arm == plan.SGLANG


def test_a_failed_cell_is_run_again_and_its_good_try_counts(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.gz")
    record.add(cell(plan.OURS, [], failure="the router did not answer"))
    assert record.done() == set()
    record.add(cell(plan.OURS, [0.1, 0.3]))
    assert record.done() == {KEY}
    assert len(judge.grouped(record.cells)[KEY].rows) == 2


def test_what_is_no_record_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "r.gz"
    path.write_bytes(gzip.compress(b'{"kind":"else"}\n'))
    with pytest.raises(RecordError, match=r"r\.gz: entry 1"):
        Record(path)


@pytest.mark.parametrize(
    ("octets", "said"),
    [
        (None, "cannot be read: No such file or directory; expected what `gpu fleet`"),
        (b"# a document\n", "is no record; expected what `gpu fleet`"),
        (gzip.compress(b"# a document\n"), "entry 1: JSON is malformed"),
        (b"", "holds no cell and no burst yet"),
        (gzip.compress(b'{"kind":"versions","of":{}}\n'), "holds no cell and no burst yet"),
    ],
)
def test_a_verdict_on_what_is_no_record_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], octets: bytes | None, said: str
) -> None:
    good, path = Record(tmp_path / "good.gz"), tmp_path / "r.gz"
    good.add(cell(plan.OURS, [0.1]))
    if octets is not None:
        path.write_bytes(octets)
    for files in ([path], [good.path, path]):
        assert main(["gpu", "verdict", *map(str, files)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert f"loadtest: {path}: {said}" in told.err
    assert path.exists() is (octets is not None)


@pytest.mark.parametrize("command", ["fleet", "surge"])
def test_cells_are_not_added_to_what_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = tmp_path / "README"
    path.write_bytes(b"# a document\n")
    assert main(["gpu", command, "--engine", "simulator", "--record", str(path)]) == 2
    assert "README: is no record" in capsys.readouterr().err
    assert path.read_bytes() == b"# a document\n"


def test_a_file_that_names_no_engines_ends_none_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gpu", "fleet", "--record", "r", "--kept", str(tmp_path / "kept.json"), "--end"]
    assert main(words) == 1
    assert "kept.json: names no engines to end" in capsys.readouterr().err


# --- order and load -------------------------------------------------------------------------------


def test_what_the_targets_compare_comes_first_and_every_cell_once() -> None:
    cells = plan.default_order(3, "4x1")
    first = cells[:3]
    assert {c.arm for c in first} == {plan.OURS, plan.SGLANG, plan.OURS_RR}
    assert {(c.workload, c.load) for c in first} == {("conversation", 0.9)}
    assert len(cells) == len(set(cells))
    todo = list(plan.left_to_do(cells, set(first), (plan.OURS, plan.NGINX)))
    assert {c.arm for c in todo} == {plan.OURS, plan.NGINX}
    assert not set(todo) & set(first)


@pytest.mark.parametrize("text", ["conversation:0.9", "conversation:0.9:who", "a:1:ours:fire"])
def test_a_plan_that_says_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--plan"):
        plan.written_order(text, 1, "4x1")


def trace(count: int, tokens: int = 1024) -> Trace:
    made = [
        Arrival(
            at_s=float(place),
            input_tokens=tokens,
            output_tokens=8,
            session=str(place),
            runs=((place * 100, tokens // 512),),
        )
        for place in range(count)
    ]
    return Trace(source="t", kind="mooncake", arrivals=tuple(made))


def test_the_scale_brings_as_many_uncached_tokens_as_the_load_says() -> None:
    scale = load.scale_for(trace(200), 5120.0, seconds=10, replicas=2, cache_tokens=100_000)
    sent = load.within(trace(200), scale, 10)
    assert sum(a.input_tokens for a in sent.arrivals) == pytest.approx(51_200, rel=0.03)


def test_a_trace_that_is_too_short_for_the_load_says_what_to_change() -> None:
    with pytest.raises(TraceError, match="--sessions-share"):
        load.scale_for(trace(20), 5120.0, seconds=10, replicas=2, cache_tokens=100_000)


def test_repeats_have_no_session_in_common_and_unique_prompts_no_block() -> None:
    choice = load.Choice(sessions_share=3)
    parts = [load.arrivals_of(choice, "conversation", repeat).arrivals for repeat in range(3)]
    sessions = [{a.session for a in part} for part in parts]
    assert not sessions[0] & sessions[1] | sessions[1] & sessions[2] | sessions[0] & sessions[2]
    unique = load.workload_of(load.arrivals_of(choice, "unique", 0))
    assert unique.ideal_hit == 0.0
    assert len(unique.jobs) == len(parts[0])


def test_agents_are_opened_in_the_order_of_their_turns() -> None:
    turns = [msgspec.structs.replace(a, think_s=2.0, at_s=0.0) for a in trace(4).arrivals]
    closed = Trace(source="t", kind="agent", sessions=(tuple(turns[:2]), tuple(turns[2:])))
    opened = load.opened(closed, users=1)
    assert [a.session for a in opened.arrivals] == ["0", "1", "2", "3"]
    assert opened.arrivals[0].at_s == 2.0
    assert all(
        one.at_s < other.at_s
        for one, other in zip(opened.arrivals, opened.arrivals[1:], strict=False)
    )


async def test_a_tokenizer_that_splits_the_words_of_prompts_is_refused() -> None:
    async with TinyEngine() as engine:  # counts one token in every prompt
        with pytest.raises(RunError, match="counts 1 tokens in 1024 words"):
            await check_length(engine.url)


def test_unique_prompts_are_paced_by_the_chat_trace() -> None:
    assert load.paced_by(load.UNIQUE) == load.CONVERSATION
    assert load.paced_by(load.AGENTS) == load.AGENTS


def test_engines_have_addresses_and_cards_of_their_own() -> None:
    options = FleetOptions(engine="vllm", model_path="/m", shape=Shape(2, 2))
    if_missing = msgspec.structs.replace(options, engine="simulator")
    words, variables = command_of(if_missing, 1, 8000)
    assert words[-1] != "127.0.0.1"
    assert words[len(words) - words[::-1].index("--host")] == "127.0.0.2"
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,3"


# --- judging --------------------------------------------------------------------------------------


def test_twice_as_quick_is_a_half_with_an_interval_around_it() -> None:
    base = [0.4 + 0.01 * (place % 7) for place in range(32)]
    groups = judge.grouped(
        [cell(plan.OURS, [value / 2 for value in base]), cell(plan.OURS_RR, base)]
    )
    ours, other = (groups[msgspec.structs.replace(KEY, arm=a)] for a in (plan.OURS, plan.OURS_RR))
    found = judge.interval(ours, other, judge.ttft(0.5))
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.low <= 0.5 <= found.high
    rows = {(r[0], r[1]): r[-1] for r in targets.judged(groups, "4x1")}
    assert rows["TTFT p50 over round robin's", "conversation 0.9"] == "MISSED"
    assert rows["TTFT p95 over round robin's", "conversation 0.9"] == "kept"
    assert rows["TTFT p50 over sglang-router's", "conversation 0.9"] == "not run"


def test_what_the_interval_does_not_show_is_told_as_that() -> None:
    assert targets.verdict(judge.Ratio(0.7, 0.5, 0.9), 0.8).startswith("kept, not shown")
    assert targets.verdict(judge.Ratio(0.99, 0.98, 1.0), 0.97, at_least=True) == "kept"
    assert targets.verdict(judge.Ratio(0.9, 0.85, 0.95), 0.8) == "MISSED"


def test_failures_are_counted_and_have_no_time_to_first_token() -> None:
    rows = [row(3.0, 0.5), row(4.0, 0.7, error="timeout"), row(1.0, 9.0)]
    made = cell(plan.OURS, [], rows=rows)
    figures = judge.figures_of(KEY, judge.Group(cells=[made]))
    assert (figures.requests, figures.errors) == (2, 1)
    assert figures.ttft_p99_s == 0.5
    assert figures.goodput_per_s == pytest.approx(1 / 8)
    assert figures.engine_hit == pytest.approx(0.25)
    assert figures.work_max_over_mean == pytest.approx(1000 / 750)


def test_the_lab_hits_more_with_ours_than_round_robin_and_is_slower_on_slower_cards() -> None:
    made = load.workload_of(load.arrivals_of(load.Choice(), "conversation", 0))
    pools = [
        lab.Pool(replicas=4, cache_tokens=400_000, speeds=lab.speeds_of("vllm", factor, 1.0))
        for factor in (1.0, 0.5)
    ]
    rates = [lab.uncached_rate(made, pool, lab.Window(5, 15)) for pool in pools]
    assert 0.5 <= rates[1] / rates[0] < 0.7  # decoding goes on at its own speed
    ours = lab.foretell(made, plan.OURS, 8.0, 0.0, pools[0])
    blind = lab.foretell(made, plan.OURS_RR, 8.0, 0.0, pools[0])
    assert ours.hit > blind.hit
    assert lab.foretell(made, plan.OURS, 8.0, 0.0, pools[1]).ttft_p50_s > ours.ttft_p50_s


def test_the_labs_replicas_are_as_quick_as_those_that_were_measured() -> None:
    made = load.workload_of(load.arrivals_of(load.Choice(), "conversation", 0))
    window = lab.Window(5, 15)
    pool = lab.Pool(replicas=2, cache_tokens=340_000, speeds=lab.speeds_of("vllm", 1.0, 1.0))
    wanted = 0.8 * lab.uncached_rate(made, pool, window)
    fitted = lab.as_quick(made, pool, "vllm", 1.0, wanted, window)
    assert lab.uncached_rate(made, fitted, window) == pytest.approx(wanted, rel=0.02)
    assert fitted.speeds.timing.prefill_tokens_per_s < pool.speeds.timing.prefill_tokens_per_s
    assert fitted.speeds.timing.step_base_s == pool.speeds.timing.step_base_s


def test_replicas_of_a_measured_capacity_have_so_many_requests_under_way() -> None:
    made = load.workload_of(load.arrivals_of(load.Choice(), "conversation", 0))
    chooser = lab.Saturating(2)
    flights = [Flight(job, 0.0, 0) for job in made.jobs[:60]]
    assert {chooser.choose(flight, 0.0) for flight in flights} == {HELD}
    going = list(chooser.take(0.0))
    assert [flights.index(flight) % 2 == replica for flight, replica in going] == [True] * 48
    assert sum(replica for _, replica in going) == lab.AT_ONCE
    assert not list(chooser.take(0.0))
    ended, ended.replica = going[0][0], 0
    chooser.ended(ended, 1.0)
    assert list(chooser.take(1.0)) == [(flights[2 * lab.AT_ONCE], 0)]


def test_draws_differ_by_some_milliseconds_of_arrival_and_make_one_distribution() -> None:
    made = load.workload_of(load.arrivals_of(load.Choice(), "conversation", 0))
    jobs = Workload("chat", made.jobs[:60], closed_loop=False)
    pool = lab.Pool(replicas=2, cache_tokens=340_000, speeds=lab.speeds_of("vllm", 1.0, 1.0))
    flights = lab.flights_of(jobs, plan.OURS_RR, 8.0, 0.0, pool)
    assert len(flights) == lab.DRAWS * 60
    late_s = [flight.arrived_s - flight.job.at_s / 8.0 for flight in flights]
    assert 0 <= min(late_s) <= max(late_s) <= lab.JITTER_S
    assert len(set(late_s)) > len(flights) / 2


def test_a_cell_is_foretold_at_the_load_that_it_is_run_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unique prompts are sent at a part of the chat trace's capacity, which is what is measured."""
    paced: list[list[Job]] = []

    def rate(workload: Workload, *_: object) -> float:
        paced.append([*workload.jobs])
        return 30_000.0

    monkeypatch.setattr(lab, "uncached_rate", rate)
    cells = [
        msgspec.structs.replace(KEY, workload=workload, load=0.1, arm=plan.OURS_LEAST)
        for workload in (load.CONVERSATION, load.UNIQUE)
    ]
    setting = Setting(
        engine="vllm",
        kv_cache_tokens=400_000,
        conversation="conversation",
        agents="",
        sessions_share=4,
        input_tokens_max=30_000,
        output_tokens_max=64,
        seconds=5.0,
        workers=1,
        time_scale=1.0,
    )
    ahead.foretell(cells, load.Choice(), setting, "vllm")
    chat, unique = ([tuple(job.blocks) for job in jobs] for jobs in paced)
    assert chat == unique


def test_what_is_foretold_of_several_repeats_is_compared_by_geometric_means() -> None:
    def told(factor: float, hit: float = 0.3) -> lab.Foretold:
        times = dict.fromkeys(("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "tpot_p99_s"), factor)
        return lab.Foretold(tpot_p50_s=0.01, answer_p50_s=1.0, answer_p95_s=2.0, hit=hit, **times)

    def key(arm: str, repeat: int, workload: str = "conversation") -> CellKey:
        return msgspec.structs.replace(KEY, workload=workload, arm=arm, repeat=repeat)

    table = ahead.means({
        key(plan.OURS, 0): told(0.5),
        key(plan.SGLANG, 0): told(1.0),
        key(plan.OURS, 1): told(1.0),
        key(plan.SGLANG, 1): told(0.5),
        key(plan.OURS, 2): told(9.0),  # nobody to be compared with
        key(plan.OURS, 0, "unique"): told(2.0, hit=0.0),
        key(plan.OURS_LEAST, 0, "unique"): told(1.0, hit=0.0),
    })  # fmt: skip
    _, unique, chat = (line.split() for line in table.splitlines())
    assert unique[0] == plan.OURS_LEAST
    assert unique[-8:] == ["2.00", "2.00", "2.00", "1.00", "2.00", "1.00", "1.00", "-"]
    assert (chat[0], chat[-9:]) == (plan.SGLANG, ["2", *["1.00"] * 8])


def test_a_burst_that_was_broken_off_is_told_as_that_and_has_no_figures() -> None:
    record = Record.__new__(Record)
    whole = Burst(
        rung="cold", factor=10, rows=[row(11.0, 0.5)], ready_s=[0.0, 3.5], began_s=10, seconds=20
    )
    broken = msgspec.structs.replace(whole, rung="suspended", failure="broken off after 235 of 880")
    record.entries = [whole, broken]
    text, _ = report.text_of(record)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "0.500" in line] == ["cold"]
    assert lines[-2:] == ["Failed", "burst, suspended: broken off after 235 of 880"]


def test_replicas_of_more_cards_are_as_quick_as_the_planner_says(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    considered = [
        {"gpus": 1, "step_expected_s": 0.006, "first_token_expected_s": 0.2, "fits": True},
        {"gpus": 2, "step_expected_s": 0.004, "first_token_expected_s": 0.1},
    ]
    plan.write_text(json.dumps({"plans": [{"considered": considered}]}))
    told = planned.read_plan(str(plan))
    one = lab.Pool(replicas=2, cache_tokens=1000, speeds=lab.speeds_of("vllm", 1.0, 1.0))
    two = planned.on_cards(one, 2, told)
    assert two is not None
    before, after = one.speeds.timing, two.speeds.timing
    assert after.prefill_tokens_per_s == pytest.approx(2 * before.prefill_tokens_per_s)
    assert after.base_s(8) == pytest.approx(before.base_s(8) / 1.5)
    assert after.step_s_per_context_token == pytest.approx(before.step_s_per_context_token / 2)
    assert (two.replicas, two.cache_tokens) == (2, 2000)
    assert planned.on_cards(one, 4, told) is None


@pytest.mark.parametrize(
    ("octets", "word"),
    [
        (None, "cannot be read"),
        (b"{}", "expected what `doherty plan --json` says"),
        (b'{"plans": []}', "plans for 0 types of GPU; name one by --gpu"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, octets: bytes | None, word: str) -> None:
    file = tmp_path / "plan.json"
    if octets is not None:
        file.write_bytes(octets)
    with pytest.raises(RecordError, match=word):
        planned.read_plan(str(file))


def test_cells_of_several_cards_stand_below_those_of_one_with_their_ratio() -> None:
    wide = msgspec.structs.replace(KEY, shape="2x2")
    groups = {
        KEY: judge.Group(cells=[cell(plan.OURS, [0.4, 0.4])]),
        wide: judge.Group(cells=[cell(plan.OURS, [0.2, 0.2])]),
    }
    times = dict.fromkeys(("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "tpot_p99_s"), 0.5)
    told = lab.Foretold(tpot_p50_s=0.01, answer_p50_s=1.0, answer_p95_s=2.0, hit=0.3, **times)
    less = msgspec.structs.replace(told, ttft_p50_s=0.3)
    first, second, ratio = planned.rows(groups, {KEY: told, wide: less}, "4x1")
    assert (first[0], second[0]) == (KEY.text, wide.text)
    assert ratio[1:3] == ["0.60", "0.50"]
    assert planned.rows(groups, {KEY: told}, "4x1") == []  # nothing was planned


def test_a_burst_is_as_many_times_as_dense() -> None:
    made = arrivals(Load(rate=2, factor=5, before_s=5, burst_s=4, after_s=5))
    times = [a.at_s for a in made.arrivals]
    assert sum(5 <= at_s < 9 for at_s in times) == pytest.approx(40, abs=2)
    assert sum(at_s < 5 for at_s in times) == pytest.approx(10, abs=1)


# --- the whole ------------------------------------------------------------------------------------


def test_two_cells_are_measured_once_and_judged_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EVENTS_PORT", "REPLAY_PORT"):  # fixed on machines that do nothing else
        port = free_port()
        for module in (engines, rivals):
            monkeypatch.setattr(module, name, port)
    record = tmp_path / "fleet.gz"
    words = ["gpu", "fleet", "--engine", "simulator", "--record", str(record), "--replicas", "2"]
    words += ["--seconds", "1", "--capacity-s", "0.6", "--sessions-share", "1", "--repeats", "1"]
    words += ["--max-input-tokens", "4000", "--max-output-tokens", "8", "--workers", "1"]
    words += ["--plan", "conversation:0.3:ours,ours_round_robin", "--logs", str(tmp_path / "logs")]
    assert main([*words, "--kept", str(tmp_path / "kept.json"), "--start"]) == 0
    kept = json.loads((tmp_path / "kept.json").read_bytes())
    try:
        assert main([*words, "--kept", str(tmp_path / "kept.json")]) == 0
        assert json.loads((tmp_path / "kept.json").read_bytes()) == kept  # the same engines
        again = Record(record)
        assert [c.key.arm for c in again.cells] == [plan.OURS, plan.OURS_RR]
        assert sum(isinstance(entry, Capacity) for entry in again.entries) == 1
        assert again.versions["simulator"]
        for made in again.cells:
            assert made.rows
            assert not [r.error for r in made.rows if r.error]
            assert made.router_s > 0
            assert made.told["replicas_by_events"] == 2
        counted = sum(one.prompt for one in again.cells[0].engines)
        assert counted == pytest.approx(sum(r.prompt_tokens for r in again.cells[0].rows))
        assert main([*words, "--kept", str(tmp_path / "kept.json")]) == 0
        assert len(Record(record).cells) == 2  # nothing was left to do
    finally:
        assert main([*words, "--kept", str(tmp_path / "kept.json"), "--end"]) == 0
    assert not (tmp_path / "kept.json").exists()
    capsys.readouterr()
    assert main(["gpu", "verdict", str(record)]) in (0, 1)
    text = capsys.readouterr().out
    assert "conversation 0.3 ours 2x1" in text
    assert "a rehearsal" in text
