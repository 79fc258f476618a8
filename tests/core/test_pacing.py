"""The time between tokens: what a stream more costs by then, and what that does to a price."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import claim_limits, limits
from proxy.core.fleet import Pool
from proxy.core.lease import Lease
from proxy.core.pacing import Pacing
from proxy.core.picture import Picture
from proxy.core.policy import Prices, Request, prefix, terms
from tests.core.builders import chain, pool, replica


def _taught(samples: list[tuple[int, float]]) -> Pacing:
    pacing = Pacing()
    pacing.open(0)
    for streams, seconds in samples:
        pacing.learn(0, streams, seconds)
    return pacing


def test_what_nobody_has_seen_is_not_known_and_makes_nothing_late() -> None:
    pacing = _taught([])
    assert pacing.expected_s(0, 5) == pacing.late_s(0, 5, 0.001) == 0.0


def test_the_longer_answers_are_the_less_a_second_makes_each_token_later() -> None:
    pacing = _taught([])
    assert pacing.stall(0, 0.0) == 0.0
    known = pacing.stall(0, 3.0)
    assert known == pytest.approx(3 * pacing.stall(0, 1.0))
    for _ in range(200):
        pacing.learn_length(0, int(2 * claim_limits.OUTPUT_TOKENS_DEFAULT))
    assert pacing.stall(0, 3.0) == pytest.approx(known / 2, rel=0.01)
    for _ in range(200):
        pacing.learn_length(0, 4)
    assert pacing.stall(0, 1.0) == pytest.approx(limits.STALL_WEIGHT / limits.ANSWER_FEWEST_TOKENS)
    assert pacing.stall(0, 1000.0) == pacing.stall(0, 2000.0) == limits.STALL_SHARE_MAX
    for _ in range(200):
        pacing.learn_length(0, 1)  # between one token and the next there is nothing here
    assert pacing.stall(0, 1000.0) == 0.0
    pacing.open(0)  # another replica has the slot: nothing of that is known of it
    assert pacing.stall(0, 3.0) == known


def test_while_numbers_do_not_differ_a_stream_more_costs_nothing() -> None:
    pacing = _taught([(8, 0.02)] * 50)
    assert pacing.expected_s(0, 9) == pacing.expected_s(0, 64) == pytest.approx(0.02)


def test_a_step_that_grows_with_its_streams_is_learned_as_that() -> None:
    draw = random.Random(3)
    numbers = [draw.randint(1, 64) for _ in range(400)]
    pacing = _taught([(n, 0.006 + 0.0002 * n + draw.gauss(0.0, 0.0003)) for n in numbers])
    for n in (1, 16, 48, 64):
        assert pacing.expected_s(0, n) == pytest.approx(0.006 + 0.0002 * n, rel=0.1)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 256), st.floats(1e-4, 10.0)), min_size=1, max_size=40),
    st.integers(1, 512),
)
def test_whatever_is_learned_a_time_is_one_and_never_grows_faster_than_the_streams(
    samples: list[tuple[int, float]], streams: int
) -> None:
    pacing = _taught(samples)
    now_s, more_s = pacing.expected_s(0, streams), pacing.expected_s(0, streams + 1)
    assert 0.0 < now_s <= more_s
    mean_s = pacing.s_per_token[0]
    usual = max(1.0, pacing._streams[0])
    assert more_s - now_s <= mean_s / usual * (1 + 1e-6) + 1e-12


def test_a_new_replica_in_a_slot_is_as_nobody_has_seen_it() -> None:
    pacing = _taught([(1, 0.01), (9, 0.05), (3, 0.02)])
    pacing.open(0)
    assert pacing.expected_s(0, 4) == 0.0


def _busy(picture: Picture, slot: int, streams: int) -> None:
    """Let so many requests decode there."""
    for _ in range(streams):
        lease = Lease(slot, "", prefill_tokens=1, prompt_tokens=1, streamed=True)
        picture.loads.acquire(lease, 0.0)
        picture.loads.prefilling.ended(lease, 0.0)


def _chosen(tpot_s: float, replicas: Pool, picture: Picture) -> tuple[str, float]:
    """Return where a request goes that wants its tokens so soon, and what being slow adds there."""
    request = Request(chain(1, 8), has_session=False)
    request.tpot_s = tpot_s
    decision = prefix(request, replicas, picture, 0.0)
    assert decision is not None
    found = terms(decision, request, picture, 0.0)
    priced = Prices(request, replicas, picture, 0.0).prices_s
    assert found.price_s == pytest.approx(priced[picture.seats(replicas).places[decision.slot]])
    return decision.replica.name, found.pace_s


def test_one_that_wants_its_tokens_soon_goes_where_it_will_have_them() -> None:
    replicas = pool([replica("a"), replica("b")])
    picture = Picture(random.Random(1).random)
    picture.know(replicas.replicas.values())
    loads, slots = picture.loads, picture.slots
    for name in "ab":
        for streams in (1, 40) * 30:
            loads.pacing.learn(slots[name], streams, 0.01 + 0.001 * streams)
    _busy(picture, slots["a"], 30)
    loads.acquire(Lease(slots["b"], "b", prefill_tokens=1000, prompt_tokens=1000), 0.0)
    assert _chosen(0.0, replicas, picture) == ("a", 0.0)
    assert _chosen(0.06, replicas, picture) == ("a", 0.0)
    assert _chosen(0.02, replicas, picture) == ("b", 0.0)
    # Nobody is kept from anything: where all are slow, one of them takes it, and says by how much.
    name, late_s = _chosen(0.005, replicas, picture)
    assert name == "b"
    assert late_s == pytest.approx(0.006 * claim_limits.OUTPUT_TOKENS_DEFAULT, rel=0.05)
    _busy(picture, slots["b"], 60)
    assert _chosen(0.005, replicas, picture)[0] == "a"
