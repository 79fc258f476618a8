"""Who may have how many requests open."""

from __future__ import annotations

from proxy.core.crowd import Crowd


def _fill(crowd: Crowd, tenant: str, weight: float, open_max: int, total: int) -> int:
    """Let one tenant come until it may not; return how many are open then."""
    while crowd.may_enter(tenant, weight, total, open_max):
        crowd.enter(tenant)
        total += 1
    return total


def test_one_alone_gets_nearly_all_and_there_is_room_for_the_next() -> None:
    crowd = Crowd()
    total = _fill(crowd, "a", 1.0, 1700, 0)
    assert 1590 <= total <= 1610
    both = _fill(crowd, "b", 1.0, 1700, total)
    assert 1690 <= both <= 1700
    assert both - total > 80


def test_a_thousand_tenants_never_have_more_than_there_may_be() -> None:
    crowd, total = Crowd(), 0
    for number in range(1000):
        total = _fill(crowd, f"t{number}", 2.0, 256, total)
    assert 250 < total <= 256


def test_who_leaves_leaves_nothing() -> None:
    crowd = Crowd()
    for _ in range(3):
        crowd.enter("a")
    for _ in range(3):
        crowd.leave("a")
    assert len(crowd) == 0
