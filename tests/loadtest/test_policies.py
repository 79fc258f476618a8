"""The policy lab: laws of its replicas, the rules' ranking, and that it drives the core itself."""

from __future__ import annotations

import itertools
import json
import random
from collections import OrderedDict
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.__main__ import main
from loadtest.policies import cells, ours, rivals, targets
from loadtest.policies.caches import Caches, SharedMemory
from loadtest.policies.cells import Burst, Cell, Source, goodput, run_cell, scale_of
from loadtest.policies.chains import chains_of
from loadtest.policies.engines import Timing
from loadtest.policies.rivals import rule_of
from loadtest.policies.router import Rival
from loadtest.policies.synthetic import nothing_shared, shared_head
from loadtest.policies.workload import BLOCK_TOKENS, Job, Picked, Workload, from_trace
from loadtest.policies.world import Drive, Fleet, Stage
from loadtest.traces import Arrival, Trace, TraceError
from proxy.core import limits
from proxy.core.picture import Picture

SHIPPED = Source(name="conversation", picked=Picked(limit=600))
TIMING = Timing()


def jobs_of(*rows: tuple[float, int, int, tuple[int, ...]]) -> Workload:
    """Make a workload of (arrival, prompt tokens, answer tokens, blocks)."""
    jobs = []
    for index, (at_s, prompt, answer, blocks) in enumerate(rows):
        job = Job(index, index, blocks, tokens=(prompt, answer))
        job.at_s = at_s
        jobs.append(job)
    return Workload("made", jobs, closed_loop=False)


def run(workload: Workload, fleet: Fleet, policy: str = "round_robin") -> Stage:
    stage = Stage(workload, fleet, Drive())
    assert stage.run(Rival(stage, rule_of(policy), shared=True))
    return stage


@pytest.mark.parametrize("chunk_tokens", [512, 3000, 100_000])
def test_attention_costs_the_same_however_a_prompt_is_cut(chunk_tokens: int) -> None:
    rate, squared = 50_000.0, 5e-10
    timing = Timing(
        prefill_tokens_per_s=rate, prefill_s_per_token_squared=squared, chunk_tokens=chunk_tokens
    )
    rows = ((0.0, 10_000, 1, tuple(range(20))), (9.0, 20_000, 1, tuple(range(19)) + (20,) * 21))
    fleet = Fleet(replicas=1, capacity_tokens=1_000_000, timing=timing)
    (engine,) = run(jobs_of(*rows), fleet).engines
    cached = 19 * BLOCK_TOKENS
    tokens, squares = 30_000 - cached, 10_000**2 + 20_000**2 - cached**2
    assert engine.work_s == pytest.approx(tokens / rate + squares * squared)


def drawn(seed: int, count: int = 120) -> Workload:
    """Make requests of all sizes, some of which share what they begin with."""
    chance = random.Random(seed)
    at_s = 0.0
    rows = []
    for index in range(count):
        at_s += chance.expovariate(8.0)
        blocks = chance.randint(1, 40)
        shared = chance.randint(0, blocks) if chance.random() < 0.5 else 0
        names = tuple(range(shared)) + tuple(1000 * (index + 1) + i for i in range(shared, blocks))
        tokens = blocks * BLOCK_TOKENS - chance.randint(0, BLOCK_TOKENS - 1)
        rows.append((at_s, tokens, chance.randint(1, 300), names))
    return jobs_of(*rows)


# --- replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["serial", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_work_is_neither_lost_nor_made(model: str, seed: int) -> None:
    workload = drawn(seed)
    stage = run(workload, Fleet(replicas=3, capacity_tokens=64 * BLOCK_TOKENS, model=model))
    assert sorted(f.job.index for f in stage.flights) == list(range(len(workload.jobs)))
    for place, engine in enumerate(stage.engines):
        here = [flight for flight in stage.flights if flight.replica == place]
        tokens = sum(max(1, f.job.prompt_tokens - f.cached_tokens) for f in here)
        assert engine.work_s == pytest.approx(tokens / TIMING.prefill_tokens_per_s)
        assert (engine.requests, engine.running, len(engine.queue)) == (len(here), 0, 0)
        assert engine.under_way_s(stage.now_s) == 0
    for flight in stage.flights:
        assert flight.arrived_s < flight.first_s <= flight.ended_s < float("inf")


@pytest.mark.parametrize("model", ["serial", "mixed"])
def test_prefill_is_first_come_first_served(model: str) -> None:
    stage = run(drawn(7), Fleet(replicas=2, capacity_tokens=200_000, model=model))
    for place in range(2):
        here = [flight for flight in stage.flights if flight.replica == place]
        firsts = [flight.first_s for flight in sorted(here, key=lambda f: f.arrived_s)]
        assert firsts == sorted(firsts)


def test_a_serial_replica_computes_one_prompt_after_the_other() -> None:
    workload = jobs_of((0.0, 30_000, 51, tuple(range(59))), (0.5, 15_000, 1, tuple(range(30))))
    stage = run(workload, Fleet(replicas=1, capacity_tokens=1_000_000, model="serial"))
    first, second = stage.flights
    assert first.first_s == pytest.approx(1.0)
    assert first.ended_s == pytest.approx(1.0 + 51 / TIMING.decode_tokens_per_s)
    # All of its blocks are there by then; one token is always computed.
    assert second.cached_tokens == 15_000
    assert second.first_s == pytest.approx(1.0 + 1 / TIMING.prefill_tokens_per_s)


def test_a_long_prompt_stalls_the_answers_beside_it() -> None:
    alone = jobs_of((0.0, 512, 101, (1,)))
    fleet = Fleet(replicas=1, capacity_tokens=1_000_000)
    (flight,) = run(alone, fleet).flights
    calm_s = flight.ended_s - flight.first_s
    context_s = (100 * 513 + 99 * 100 / 2) * TIMING.step_s_per_context_token
    assert calm_s == pytest.approx(100 * TIMING.base_s(1) + context_s)

    beside = jobs_of((0.0, 512, 101, (1,)), (0.1, 16_384, 1, tuple(range(10, 42))))
    flight, long = run(beside, fleet).flights
    stalled_s = flight.ended_s - flight.first_s - calm_s
    assert stalled_s == pytest.approx(16_384 / TIMING.prefill_tokens_per_s, rel=0.01)
    # Its own chunks begin with the next step and wait for the tokens beside them.
    assert 16_384 / TIMING.prefill_tokens_per_s < long.ttft_s < 0.6


def test_stretches_of_answers_end_where_single_steps_would() -> None:
    """Somebody who arrives within a stretch meets the end of the step that runs then."""
    rows = [(0.0, 512 * n, 200 * n, tuple(range(100 * n, 101 * n))) for n in range(1, 5)]
    stage = run(jobs_of(*rows, (1.0, 1, 1, (9,))), Fleet(replicas=1, capacity_tokens=1_000_000))
    last = stage.flights[-1]
    begins_s = last.first_s - 1 / TIMING.prefill_tokens_per_s
    step_s = TIMING.base_s(4) + 20_000 * TIMING.step_s_per_context_token
    assert 1.0 < last.first_s < 1.0 + 2 * step_s
    assert begins_s > 1.0


def test_a_straggler_takes_longer_for_everything() -> None:
    workload = jobs_of((0.0, 8192, 100, tuple(range(16))))
    for model in ("serial", "mixed"):
        fleets = [
            Fleet(replicas=1, capacity_tokens=100_000, model=model, slow=slow)
            for slow in (1.0, 0.5)
        ]
        fast, slow = (run(workload, fleet).flights[0] for fleet in fleets)
        assert slow.ttft_s == pytest.approx(2 * fast.ttft_s)


class Reference:
    """Least recently used, written as plainly as it can be."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def insert(self, blocks: tuple[int, ...]) -> None:
        for block in reversed(blocks[: self.capacity]):
            self.blocks.pop(block, None)
            self.blocks[block] = None
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)

    def depth(self, blocks: tuple[int, ...]) -> int:
        return len(list(itertools.takewhile(self.blocks.__contains__, blocks)))


def chain(session: int, length: int) -> tuple[int, ...]:
    return tuple(100 * session + i if i >= 3 else i for i in range(length))


CHAINS = st.builds(chain, st.integers(1, 6), st.integers(1, 12))


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 2), CHAINS), max_size=40))
def test_caches_forget_the_least_recently_used(
    capacity: int, inserts: list[tuple[int, tuple[int, ...]]]
) -> None:
    caches = Caches(3, capacity)
    references = [Reference(capacity) for _ in range(3)]
    for replica, blocks in inserts:
        caches.insert(replica, blocks)
        references[replica].insert(blocks)
        depths = [reference.depth(blocks) for reference in references]
        assert caches.depths(blocks) == depths
        assert [caches.depth(place, blocks) for place in range(3)] == depths


@given(st.integers(12, 60), st.lists(st.tuples(CHAINS, st.integers(0, 4)), max_size=30))
def test_running_requests_keep_their_blocks_and_all_fits(
    capacity: int, requests: list[tuple[tuple[int, ...], int]]
) -> None:
    memory = SharedMemory(1, capacity)
    running: list[tuple[tuple[int, ...], int]] = []
    for blocks, answer in requests:
        while not memory.admit(0, blocks, answer):
            assert running or len(blocks) + answer > capacity
            if not running:
                return
            memory.leave(0, *running.pop(0))
        running.append((blocks, answer))
        for held, _ in running:
            assert memory.depth(0, held) == len(held)
        assert memory.used_blocks(0) + len(memory.idle[0]) <= capacity
    for held in running:
        memory.leave(0, *held)
    assert memory.used_blocks(0) == 0


# --- workloads ----------------------------------------------------------------------------------


def arrival(runs: tuple[tuple[int, int], ...], tokens: int, size: int, **more: object) -> Arrival:
    return Arrival(input_tokens=tokens, output_tokens=1, block_tokens=size, runs=runs, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "whole"), [(64, 8), (512, 1), (1024, 1)])
def test_blocks_of_any_size_become_blocks_of_512_tokens(size: int, whole: int) -> None:
    """Prompts share what they share in whole blocks, and no more."""
    count = 2 * max(1, 1024 // size) + whole
    one = arrival(((1, count),), count * size, size)
    two = arrival(((1, count - 1), (900, 1)), count * size, size)
    trace = Trace(source="t", kind="mooncake", arrivals=(one, two, one))
    first, second, third = from_trace(trace, Picked()).jobs
    assert len(first.blocks) == count * size // BLOCK_TOKENS
    assert first.blocks == third.blocks
    shared = sum(a == b for a, b in zip(first.blocks, second.blocks, strict=True))
    assert shared == len(first.blocks) - max(1, size // BLOCK_TOKENS)


def test_users_work_through_their_sessions_one_after_the_other() -> None:
    turns = tuple(arrival(((10 * n, 8),), 512, 64, think_s=2.0) for n in range(1, 4))
    trace = Trace(source="t", kind="agent", sessions=(turns,) * 4)
    workload = from_trace(trace, Picked(users=2, turns_max=2))
    assert len(workload.jobs) == 8
    assert [job.follows for job in workload.jobs] == [-1, 0, -1, 2, 1, 4, 3, 6]
    assert [job.think_s for job in workload.jobs][4:6] == [5.0, 2.0]
    stage = run(workload, Fleet(replicas=1, capacity_tokens=100_000))
    by_index = {flight.job.index: flight for flight in stage.flights}
    for job in workload.jobs:
        if job.follows >= 0:
            gap_s = by_index[job.index].arrived_s - by_index[job.follows].ended_s
            assert gap_s == pytest.approx(job.think_s)


def test_what_fits_no_replica_is_left_out_and_its_followers_are_not() -> None:
    rows = [(float(n), 512 * n, 1, tuple(range(n))) for n in (1, 9, 2)]
    workload = jobs_of(*rows)
    workload.jobs[1].follows, workload.jobs[2].follows = 0, 1
    kept = workload.fitting(4 * BLOCK_TOKENS)
    assert [(job.prompt_tokens, job.follows) for job in kept.jobs] == [(512, -1), (1024, 0)]
    with pytest.raises(TraceError, match="no request fits"):
        workload.fitting(BLOCK_TOKENS)


def test_the_synthetic_workloads_share_what_they_say() -> None:
    assert nothing_shared(200).ideal_hit == 0
    workload = shared_head(400)
    assert {job.blocks[:4] for job in workload.jobs} == {(0, 1, 2, 3)}
    later = [job for job in workload.jobs if job.earlier]
    assert 0.5 < len(later) / len(workload.jobs) < 0.95
    for job in later:
        assert job.opener not in range(4)


# --- chains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", ["chain", "every"])
def test_chains_share_what_prompts_share(points: str) -> None:
    workload = shared_head(300)
    chains = chains_of(workload, points)
    for a, b in itertools.combinations(range(60), 2):
        left, right = workload.jobs[a], workload.jobs[b]
        blocks = sum(x == y for x, y in zip(left.blocks, right.blocks, strict=False))
        known = dict(zip(chains[a].hashes, chains[a].ends, strict=True))
        common = [known[name] for name in chains[b].hashes if name in known]
        octets = max(common, default=0)
        # A message's end may lie within a block that differs.
        assert octets < (blocks + 1) * BLOCK_TOKENS * limits.BYTES_PER_TOKEN
        for name, end in zip(chains[b].hashes, chains[b].ends, strict=True):
            assert known.get(name, end) == end
    for job, made in zip(workload.jobs, chains, strict=True):
        assert list(made.ends) == sorted(set(made.ends))
        assert made.ends[-1] == made.prompt_bytes == job.prompt_tokens * limits.BYTES_PER_TOKEN


def test_a_turn_repeats_the_end_of_the_turn_before() -> None:
    workload = shared_head(300)
    chains = chains_of(workload, "chain")
    for job in workload.jobs:
        for tokens in job.earlier:
            before = [
                j for j in workload.jobs if (j.session, j.prompt_tokens) == (job.session, tokens)
            ]
            assert chains[before[0].index].hashes[-1] in chains[job.index].hashes
    homes = {(job.session, chains[job.index].home_key) for job in workload.jobs}
    assert len(homes) == len({session for session, _ in homes})


# --- policies -----------------------------------------------------------------------------------


def test_the_rules_rank_as_they_do_elsewhere() -> None:
    """The serial model is that of published comparisons: what each rule is worth there is known.

    p99 of the time to first token: rings and counts of requests lose to tokens queued, these to
    prices; the hit rate the other way about, but for prices, which have both.
    """
    cell = Cell(source=Source(picked=Picked(limit=1500)), model="serial")
    found = {
        policy: run_cell(cell, policy)
        for policy in ("round_robin", "least_tokens", "chwbl", "llm-d", "priced", "oracle")
    }
    p99_s = {policy: figures.ttft_p99_s for policy, figures in found.items()}
    assert p99_s["priced"] <= p99_s["least_tokens"] < p99_s["chwbl"] < p99_s["round_robin"]
    assert p99_s["priced"] < p99_s["llm-d"] < p99_s["chwbl"]
    hit = {policy: figures.hit for policy, figures in found.items()}
    assert hit["least_tokens"] < hit["priced"]
    assert hit["round_robin"] < hit["chwbl"]
    assert abs(hit["priced"] / hit["oracle"] - 1) < 0.03
    assert p99_s["priced"] < 1.05 * p99_s["oracle"]


@pytest.mark.parametrize("model", ["serial", "mixed"])
def test_the_projects_own_policy_ranks_before_those_that_know_no_prefixes(model: str) -> None:
    """By a margin that a change of order among equals does not eat up."""
    cell = Cell(source=SHIPPED, model=model, load=0.9)
    ours, *others = [run_cell(cell, name) for name in ("doherty", "round_robin", "least_requests")]
    for other in others:
        assert ours.ttft_p50_s < 0.8 * other.ttft_p50_s
        assert ours.ttft_p95_s < 0.8 * other.ttft_p95_s
        assert ours.ttft_p99_s < 0.8 * other.ttft_p99_s
        assert ours.hit > 2 * other.hit


@pytest.mark.parametrize("load", [0.75, 0.9])
def test_streams_are_held_up_little_more_than_under_affinity_alone(load: float) -> None:
    """Prices even out the prefill, and with it what streams meet, unless they mind the streams."""
    cell = Cell(source=Source(picked=Picked(limit=1500)), cache_tokens=400_000, load=load)
    ours, other = (run_cell(cell, name) for name in ("doherty", "sglang:0.3:64:1.5"))
    assert ours.tpot_p50_s < 1.1 * other.tpot_p50_s
    assert ours.ttft_p50_s < 0.75 * other.ttft_p50_s
    assert ours.ttft_p99_s < 0.95 * other.ttft_p99_s


def test_round_robin_has_the_load_that_was_asked_for() -> None:
    for load in (0.5, 0.75):
        found = run_cell(Cell(source=SHIPPED, load=load, model="serial"), "round_robin")
        assert found.utilisation == pytest.approx(load, rel=0.15)
    rates = [scale_of(Cell(source=SHIPPED, load=load)) for load in (0.3, 0.6)]
    assert rates[1] == pytest.approx(2 * rates[0])


@pytest.mark.parametrize("policy", [*rivals.POLICIES, "doherty", "doherty:early"])
@pytest.mark.parametrize("model", ["serial", "mixed"])
def test_every_policy_places_everything(policy: str, model: str) -> None:
    cell = Cell(source=Source(picked=Picked(limit=150)), replicas=3, model=model)
    found = run_cell(cell, policy)
    assert found.requests == 135
    assert 0 <= found.hit <= found.hit_bound + 0.05
    assert found.ttft_p50_s <= found.ttft_p95_s <= found.ttft_p99_s < float("inf")
    again = run_cell(cell, policy)
    assert again == msgspec.structs.replace(found, decision_us=again.decision_us)


def test_unknown_policies_are_named() -> None:
    for policy in ("nonsense", "doherty:nonsense", "chwbl:a", "ring:1:2:3"):
        with pytest.raises(ValueError, match=policy):
            cells.check_policy(policy)


class Watched(Picture):
    """Counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        made.append(self)


made: list[Watched] = []


@pytest.mark.parametrize("sharing", ["all", "none"])
def test_proxies_hear_of_each_other_only_where_they_share(
    sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "Picture", Watched)
    made.clear()
    cell = Cell(source=Source(picked=Picked(limit=200)), proxies=3, sharing=sharing)
    run_cell(cell, "doherty")
    assert len(made) == 3
    dispatched = [sum(picture.loads.dispatched_tokens) for picture in made]
    for picture in made:
        assert sum(picture.loads.inflight) == 0  # every lease was released
    if sharing == "all":
        # Whoever decided it: each counts all work, each by its own estimate of octets a token.
        assert max(dispatched) < 1.1 * min(dispatched)
    else:
        alone = run_cell_tokens()
        assert max(dispatched) < 0.7 * alone


def run_cell_tokens() -> int:
    made.clear()
    run_cell(Cell(source=Source(picked=Picked(limit=200))), "doherty")
    return sum(made[0].loads.dispatched_tokens)


def test_replicas_that_come_late_take_part_from_then_on() -> None:
    burst = Burst(factor=2.0, cold_s=5.0, before=2)
    for policy in ("round_robin", "doherty"):
        cell = Cell(source=SHIPPED, replicas=4, burst=burst, load=0.6)
        found = run_cell(cell, policy)
        assert found.requests == 180
        never = run_cell(
            Cell(source=SHIPPED, replicas=4, burst=Burst(factor=2.0, cold_s=1e6, before=2)), policy
        )
        assert found.ttft_p99_s < never.ttft_p99_s


def test_goodput_is_a_rate_that_keeps_the_limit() -> None:
    cell = Cell(source=Source(picked=Picked(limit=300)), replicas=2)
    blind, priced = (goodput(cell, policy, 2.0) for policy in ("round_robin", "priced"))
    assert 0 < blind < priced


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--limit", "60", "--policies", "round_robin,doherty", "--quiet"]
    arguments = ["policies", "conversation", *options]
    for more, cells_made in (([], 1), (["--load", "0.5,0.9", "--replicas", "2,4"], 4)):
        plot = tmp_path / f"{cells_made}.svg"
        written = ["--json", str(out), "--plot", str(plot)]
        assert main([*arguments, *more, *written, "--processes", "2"]) == 0
        printed = capsys.readouterr()
        assert printed.out.count("conversation N=") == cells_made
        assert printed.out.count("\n  doherty ") == cells_made
        value = json.loads(out.read_text())
        assert len(value["cells"]) == cells_made
        assert value["cells"][0]["figures"][0]["policy"] == "round_robin"
        assert plot.stat().st_size > 1000
    assert main([*arguments, "--goodput", "2"]) == 0
    assert "95 % start within 2 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "no such file"),
        (["conversation", "--policies", "best"], "policy 'best': unknown"),
        (["conversation", "--plot", "x.pdf"], "must end in"),
        (["conversation", "--json", "/nowhere/x"], "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policies", *arguments]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--burst=2:x:4", "--load=0", "--replicas=0", "--policies=,"])
def test_nonsense_on_the_command_line_is_refused(argument: str) -> None:
    with pytest.raises(SystemExit):
        main(["policies", argument])


def test_every_target_can_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small part of the matrix, with few requests: that it runs, not what comes out."""
    monkeypatch.setattr(targets, "FLEETS", (2,))
    monkeypatch.setattr(targets, "CACHES", (200_000,))
    monkeypatch.setattr(targets, "LOADS", (0.5,))
    monkeypatch.setattr(targets, "SYNTHETIC_REQUESTS", 100)
    monkeypatch.setattr(targets, "BELIEF_AFTER", 50)
    monkeypatch.setattr(cells, "GOODPUT_STEPS", 2)
    monkeypatch.setattr(rivals, "RIVALS", ("round_robin",))
    monkeypatch.setattr(targets.decisions, "REPLICAS", (8,))
    source = Source(picked=Picked(limit=120))
    verdicts = targets.judge([source], ["serial"], 1, lambda _: None)
    text = targets.table(verdicts)
    assert text.endswith(f"of {len(verdicts)} kept")
    assert len(verdicts) > 15
    for verdict in verdicts:
        assert verdict.name in text
        assert verdict.figure > 0
