"""What offline work may take of a replica beside work that somebody waits for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import claim_limits
from proxy.core.spare import Spare


def _spare() -> Spare:
    spare = Spare()
    spare.open(1)
    return spare


def test_beside_nobody_there_is_no_bound() -> None:
    spare = _spare()
    for _ in range(10):
        spare.dispatched(1, 1.0, 100.0, urgent=False)
        assert not spare.beside(1, 100.0)
        assert spare.opens_s(1, 100.0) == 100.0


def test_what_has_been_taken_must_be_no_more_than_its_part_before_more_comes() -> None:
    spare = _spare()
    spare.dispatched(1, 0.001, 10.0, urgent=True)
    spare.dispatched(1, 0.1, 10.0, urgent=False)
    part = (claim_limits.SPARE_BUSY_MAX - 0.001 / claim_limits.BESIDE_S) ** 2
    assert spare.opens_s(1, 10.0) == pytest.approx(10.0 + 0.1 / part)
    # Where the other work stays away, the bound goes with it.
    spare.dispatched(1, 100.0, 10.0, urgent=False)
    assert spare.opens_s(1, 10.0) == 10.0 + claim_limits.BESIDE_S
    assert spare.opens_s(1, 15.0) == 15.0


def test_a_newcomer_in_the_slot_has_no_past() -> None:
    spare = _spare()
    spare.dispatched(1, 4.0, 10.0, urgent=True)
    spare.dispatched(1, 4.0, 10.0, urgent=False)
    spare.open(1)
    assert not spare.beside(1, 10.0)
    spare.dispatched(1, 0.0, 10.0, urgent=True)
    assert spare.opens_s(1, 10.0) <= 10.0
    assert spare.part(1, 10.0) == pytest.approx(claim_limits.SPARE_BUSY_MAX**2)


@given(busy=st.floats(0.0, 1.2), prompt_s=st.floats(0.01, 0.5))
def test_it_gets_less_the_fuller_the_replica_is_and_always_a_little(
    busy: float, prompt_s: float
) -> None:
    spare, now_s, given_s = _spare(), 0.0, 0.0
    while now_s < 120.0:
        now_s += 0.5
        spare.dispatched(1, 0.5 * busy, now_s, urgent=True)
        if now_s >= 60.0 and spare.opens_s(1, now_s) <= now_s:
            spare.dispatched(1, prompt_s, now_s, urgent=False)
            given_s += prompt_s
    left = max(0.0, claim_limits.SPARE_BUSY_MAX - busy)
    part = max(claim_limits.SPARE_SHARE_MIN, left * left)
    assert 0.0 < given_s <= 60.0 * part * 1.3 + prompt_s
