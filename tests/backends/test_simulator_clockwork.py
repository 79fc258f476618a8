"""The clockwork in virtual time: the measured figures, and the laws of the scheduler."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulator.clockwork import Clockwork, Emission, Limits, Phase, Sequence
from backends.simulator.kv_cache import KvCache
from backends.simulator.profiles import PROFILES, Profile, parse_profile
from backends.simulator.tally import Tally
from backends.simulator.tokens import StopFinder, WordSource, pack_ids

LAWS = settings(derandomize=True, max_examples=60, deadline=None)
H200 = PROFILES["h200-8b"]


def clockwork(
    profile: Profile = H200, *, blocks: int = 21_000, block_tokens: int = 16, **limits: int
) -> Clockwork:
    """Return a clockwork with an engine's defaults."""
    bounds = Limits(
        limits.get("sequences", 1024),
        limits.get("batched", 8192),
        limits.get("model", 200_000),
        limits.get("interval", 1),
    )
    return Clockwork(profile, KvCache(blocks, block_tokens), bounds, Tally())


def prompt_of(tokens: int, salt: int = 0, shared: int = 0) -> bytes:
    """Return a prompt whose tokens after the first `shared` belong to `salt` alone."""
    return pack_ids([*range(shared), *(salt * 1_000_000 + n for n in range(shared, tokens))])


def sequence(prompt: bytes, max_tokens: int = 1, rank: int = 0) -> Sequence:
    """Return a sequence."""
    made = Sequence(prompt, max_tokens=max_tokens, words=WordSource(prompt, 0))
    made.rank = rank
    return made


class Told(NamedTuple):
    """An emission and when it came."""

    at_s: float
    emission: Emission


def run(engine: Clockwork, now_s: float = 0.0) -> list[Told]:
    """Run until nothing is left, checking the books at each step."""
    told = []
    while (start_s := engine.next_ready_s(now_s)) is not None:
        step = engine.plan(start_s)
        assert step is not None
        assert sum(count for _, count in step.work) <= engine.limits.batched_tokens_max
        assert len(engine.running) <= engine.limits.sequences_max
        now_s = step.end_s
        told += [Told(now_s, emission) for emission in engine.finish(step)]
        cache = engine.cache
        # Shared blocks make the pool hold at most what the sequences hold one by one.
        assert cache.used_blocks <= sum(s.held_blocks for s in engine.running)
        assert cache.used_blocks + cache.cached_blocks <= cache.blocks_max
    assert engine.cache.used_blocks == 0
    return told


# vLLM 0.26.0 on an H200, milliseconds: prompt tokens → median time to first token.
@pytest.mark.parametrize(
    ("tokens", "measured_ms"),
    [(128, 15.5), (512, 19.5), (2048, 56.5), (8192, 231.8), (16_384, 502.6), (32_000, 1249.6)],
)
def test_time_to_first_token_is_the_measured_one_within_3_percent(
    tokens: int, measured_ms: float
) -> None:
    engine = clockwork()
    engine.submit(sequence(prompt_of(tokens)), 0.0)
    assert run(engine)[0].at_s * 1e3 == pytest.approx(measured_ms, rel=0.03)


# The same after the prompt was seen: all cached, or all but the last 200 tokens.
@pytest.mark.parametrize(
    ("tokens", "new_tokens", "least_ms", "most_ms"),
    [(8192, 0, 23, 24.4), (8192, 200, 24, 25.2), (32_000, 0, 54, 82), (32_000, 200, 60, 86)],
)
def test_time_to_first_token_of_cached_prompts_is_in_the_measured_range_within_10_percent(
    tokens: int, new_tokens: int, least_ms: float, most_ms: float
) -> None:
    engine = clockwork()
    engine.submit(sequence(prompt_of(tokens)), 0.0)
    end_s = run(engine)[-1].at_s
    again = sequence(prompt_of(tokens, salt=1, shared=tokens - new_tokens))
    engine.submit(again, end_s)
    first_ms = (run(engine, end_s)[0].at_s - end_s) * 1e3
    # The last token is always computed, so the block that holds it is not used.
    assert again.cached_tokens == (tokens - max(new_tokens, 1)) // 16 * 16
    assert 0.9 * least_ms <= first_ms <= 1.1 * most_ms


# Milliseconds a token: batch, context at the start, tokens generated.
@pytest.mark.parametrize(
    ("batch", "context", "tokens", "measured_ms"),
    [
        (1, 128, 256, 5.20),
        (8, 128, 256, 5.52),
        (32, 128, 256, 5.72),
        (64, 128, 256, 6.26),
        (128, 128, 256, 7.76),
        (1, 8000, 128, 5.48),
        (8, 8000, 128, 7.39),
        (32, 8000, 128, 13.43),
    ],
)
def test_decode_speed_is_the_measured_one_within_3_percent(
    batch: int, context: int, tokens: int, measured_ms: float
) -> None:
    engine = clockwork()
    for number in range(batch):
        engine.submit(sequence(prompt_of(context, number), tokens), 0.0)
    told = run(engine)
    steady_s = max(t.at_s for t in told if t.emission.tokens == 1)
    ends = [t.at_s for t in told if t.emission.finish_reason]
    # From the last first token on all decode together until the first of them is done.
    counted = [t for t in told if steady_s <= t.at_s <= min(ends)]
    steps = {t.at_s for t in counted}
    assert (min(ends) - steady_s) / (len(steps) - 1) * 1e3 == pytest.approx(measured_ms, rel=0.03)


def test_a_foreign_prefill_chunk_costs_a_running_stream_a_quarter_of_a_second() -> None:
    engine = clockwork()
    stream = sequence(prompt_of(128), 200)
    engine.submit(stream, 0.0)
    engine.submit(sequence(prompt_of(8192, 1)), 0.1)
    times = [t.at_s for t in run(engine) if t.emission.sequence is stream]
    gaps = sorted(b - a for a, b in pairwise(times))
    assert 0.2 < gaps[-1] < 0.26
    assert gaps[-3] < 0.01


@LAWS
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_the_chunks_of_a_prompt_cost_what_the_prompt_costs(sizes: list[int]) -> None:
    start, total_s = 0, 0.0
    for size in sizes:
        total_s += H200.prefill_s(start, start + size)
        start += size
    assert total_s == pytest.approx(H200.prefill_s(0, start))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_profiles_are_in_order(profile: Profile) -> None:
    costs = [profile.decode_floor_s(batch) for batch in (1, 2, 8, 31, 32, 100, 128, 129, 1000)]
    assert costs == sorted(costs)
    assert all(cost > 0 for cost in costs)
    assert profile.kv_cache_tokens > profile.max_model_len
    assert profile.step_s(4, 4000, []) < profile.step_s(4, 4000, [(0, 32_000)])


WORK = st.lists(
    st.tuples(
        st.integers(1, 60),  # prompt tokens
        st.integers(1, 30),  # answer tokens
        st.integers(0, 3),  # prompts of equal salt share what they have in common
        st.integers(-2, 2),  # rank
        st.floats(0, 0.2),  # arrival
    ),
    min_size=1,
    max_size=14,
)


@LAWS
@given(WORK, st.integers(6, 14), st.integers(1, 5), st.integers(5, 24))
def test_everything_ends_whole_whatever_is_preempted(
    work: list[tuple[int, int, int, int, float]], blocks: int, sequences: int, batched: int
) -> None:
    engine = clockwork(
        PROFILES["fast"],
        blocks=blocks + 10,
        block_tokens=4,
        sequences=sequences,
        batched=batched,
        model=90,
    )
    made = []
    for prompt_tokens, answer_tokens, salt, rank, at_s in sorted(work, key=lambda row: row[4]):
        if engine.fits(prompt_tokens, answer_tokens):
            made.append(sequence(prompt_of(prompt_tokens, salt), answer_tokens, rank))
            engine.submit(made[-1], at_s)
    told = run(engine)
    for one in made:
        mine = [t.emission for t in told if t.emission.sequence is one]
        assert [e.tokens for e in mine] == list(range(1, one.max_tokens + 1))
        assert [e.finish_reason for e in mine] == [None] * (len(mine) - 1) + ["length"]
        # Preempted or not, the words are those of the prompt.
        words = WordSource(bytes(one.tokens[: one.prompt_tokens * 4]), 0)
        alone = clockwork(PROFILES["fast"])
        twin = Sequence(
            bytes(one.tokens[: one.prompt_tokens * 4]), max_tokens=one.max_tokens, words=words
        )
        alone.submit(twin, 0.0)
        assert "".join(e.text for e in mine) == "".join(t.emission.text for t in run(alone))
    assert sum(engine.tally.finished.values()) == len(made)
    assert engine.tally.prompt_tokens[False] == sum(one.prompt_tokens for one in made)


def test_running_out_of_blocks_preempts_the_newest_and_loses_nothing() -> None:
    engine = clockwork(PROFILES["fast"], blocks=10, block_tokens=4)
    old, new = sequence(prompt_of(16), 20), sequence(prompt_of(16, 1), 20)
    engine.submit(old, 0.0)
    engine.submit(new, 0.0)
    ends = {t.emission.sequence: t.at_s for t in run(engine) if t.emission.finish_reason}
    assert (old.preemptions, new.preemptions) == (0, 1)
    assert engine.tally.preemptions == 1
    assert ends[old] < ends[new]


def test_a_preempted_sequence_finds_its_own_prefix_again() -> None:
    engine = clockwork(PROFILES["fast"], blocks=40, block_tokens=4)
    one = sequence(prompt_of(64), 30)
    engine.submit(one, 0.0)
    step = engine.plan(0.0)
    assert step is not None
    engine.finish(step)
    engine.retract_all()
    assert engine.cache.used_blocks == 0
    again = engine.plan(step.end_s)
    assert again is not None
    assert [count for _, count in again.work] == [1]  # 16 blocks cached, the new token to do
    assert one.cached_tokens == 0


def test_ranks_go_before_order() -> None:
    engine = clockwork(PROFILES["fast"], sequences=1)
    ranked = [sequence(prompt_of(8, n), 3, rank) for n, rank in enumerate([0, 2, -1, 0])]
    for one in ranked:
        engine.submit(one, 0.0)
    ends = [t.emission.sequence for t in run(engine) if t.emission.finish_reason]
    assert ends == [ranked[2], ranked[0], ranked[3], ranked[1]]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_aborted_sequence_frees_its_blocks(steps: int) -> None:
    engine = clockwork(PROFILES["fast"])
    one, other = sequence(prompt_of(100), 50), sequence(prompt_of(50, 1), 5)
    engine.submit(one, 0.0)
    engine.submit(other, 0.0)
    now_s = 0.0
    for _ in range(steps):
        step = engine.plan(now_s)
        assert step is not None
        engine.finish(step)
        now_s = step.end_s
    assert engine.abort(one)
    assert [(e.sequence, e.finish_reason) for e in engine.reap()] == [(one, "abort")]
    assert one.phase is Phase.FINISHED
    assert one.held_blocks == 0
    assert not engine.abort(one)
    assert [t.emission.sequence for t in run(engine, now_s)][-1] is other
    assert engine.tally.finished == {"abort": 1, "length": 1}


def test_an_abort_during_a_step_wins_over_its_result() -> None:
    engine = clockwork(PROFILES["fast"])
    one = sequence(prompt_of(20), 5)
    engine.submit(one, 0.0)
    step = engine.plan(0.0)
    assert step is not None
    engine.abort(one)
    engine.reap()
    assert engine.finish(step) == []
    assert engine.cache.used_blocks == 0


def test_ends_by_nature_by_stop_and_by_context() -> None:
    engine = clockwork(PROFILES["fast"], model=40)
    natural, stopped, long = (sequence(prompt_of(30, n), 30) for n in range(3))
    natural.natural_end = 4
    words = WordSource(prompt_of(30, 1), 0)
    preview = clockwork(PROFILES["fast"])
    twin = Sequence(prompt_of(30, 1), max_tokens=9, words=words)
    preview.submit(twin, 0.0)
    text = "".join(t.emission.text for t in run(preview))
    stopped.stops = StopFinder([text[6:11]])  # begins in one token and ends in the next but one
    for one in (natural, stopped, long):
        engine.submit(one, 0.0)
    told = [t.emission for t in run(engine)]
    ends = {e.sequence: (e.finish_reason, e.tokens, e.stop) for e in told if e.finish_reason}
    assert ends[natural] == ("stop", 4, None)
    assert ends[stopped] == ("stop", 3, text[6:11])
    assert "".join(e.text for e in told if e.sequence is stopped) == text[:6]
    assert ends[long] == ("length", 10, None)


def test_a_stream_interval_groups_tokens_after_the_first() -> None:
    engine = clockwork(PROFILES["fast"], interval=4)
    engine.submit(sequence(prompt_of(8), 10), 0.0)
    assert [(t.emission.tokens, len(t.emission.text)) for t in run(engine)] == [
        (1, 4),
        (5, 16),
        (9, 16),
        (10, 4),
    ]


def test_the_intake_works_one_after_the_other() -> None:
    engine = clockwork()
    for number in range(8):
        engine.submit(sequence(prompt_of(8000, number, shared=8000)), 0.0)
    ready = [entry.ready_s for entry in engine._intake]
    assert ready[-1] - ready[0] == pytest.approx(7 * 8000 * 1.2e-6)


def test_a_slow_engine_takes_so_many_times_as_long() -> None:
    ends = []
    for slowdown in (1.0, 3.0):
        engine = clockwork(PROFILES["fast"])
        engine.slowdown = slowdown
        engine.submit(sequence(prompt_of(40), 5), 0.0)
        ends.append(run(engine)[-1].at_s)
    assert ends[1] == pytest.approx(3 * ends[0])


def test_what_reading_a_request_took_is_part_of_its_intake() -> None:
    first_s = []
    for spent_s in (0.0, 0.005, 3.0):
        engine = clockwork()
        engine.submit(sequence(prompt_of(128)), 5.0, spent_s)
        first_s.append(run(engine, 5.0)[0].at_s - 5.0)
    at_once_s, read_in_5_ms_s, slowly_sent_s = first_s
    assert read_in_5_ms_s == pytest.approx(at_once_s - 0.005)
    # However long the client took to send it: nothing is computed before it is here.
    assert slowly_sent_s == pytest.approx(H200.prefill_floor_s, rel=0.05)


def test_few_new_tokens_wait_for_the_weights_and_then_read_a_long_prefix() -> None:
    short_s, long_s = (H200.step_s(0, 0, [(start, start + 16)]) for start in (0, 32_000))
    assert short_s == pytest.approx(H200.prefill_floor_s, rel=0.01)
    assert long_s - short_s == pytest.approx(16 * 64_000 * H200.prefill_s_per_token_squared)


def test_a_profile_of_a_file_has_its_batches_in_order() -> None:
    octets = msgspec.json.encode(H200)
    assert parse_profile(octets) == H200
    for table in ([[1, 5e-3]], [[8, 5e-3], [1, 5e-3]], [[1, 5e-3], [1, 6e-3]]):
        broken = msgspec.json.encode({**msgspec.to_builtins(H200), "decode_base_s": table})
        with pytest.raises(ValueError, match="each larger than the last"):
            parse_profile(broken)
