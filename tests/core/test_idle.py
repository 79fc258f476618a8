"""How long an idle connection may be trusted: never longer than half of what was closed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.idle import IdleTrust


def test_nothing_learnt_is_the_whole_time() -> None:
    trust = IdleTrust()
    assert trust.trusted_s("a") == limits.UPSTREAM_IDLE_S_MAX
    assert not trust.learnt


@pytest.mark.parametrize(
    ("closed_s", "trusted_s"),
    [
        ((1.0,), 0.5),
        ((1.0, 3.0), 0.5),
        ((3.0, 1.0), 0.5),
        ((0.19,), 0.0),
        ((0.0,), 0.0),
        ((0.2,), 0.1),
        ((4.4,), 2.2),
        ((60.0,), limits.UPSTREAM_IDLE_S_MAX),
    ],
)
def test_what_is_closed_teaches(closed_s: tuple[float, ...], trusted_s: float) -> None:
    trust = IdleTrust()
    for idle_s in closed_s:
        trust.closed("a", idle_s)
    assert trust.trusted_s("a") == trusted_s
    assert trust.trusted_s("b") == limits.UPSTREAM_IDLE_S_MAX


def test_a_survivor_takes_the_lesson_back() -> None:
    trust = IdleTrust()
    trust.closed("a", 1.0)
    trust.closed("b", 1.0)
    trust.survived("a")
    trust.survived("c")
    assert (trust.trusted_s("a"), trust.trusted_s("b")) == (limits.UPSTREAM_IDLE_S_MAX, 0.5)


@given(st.lists(st.floats(0, 10), max_size=20))
def test_what_is_trusted_was_never_closed(closed_s: list[float]) -> None:
    trust = IdleTrust()
    for idle_s in closed_s:
        trust.closed("a", idle_s)
    trusted_s = trust.trusted_s("a")
    assert all(trusted_s == 0 or trusted_s < idle_s for idle_s in closed_s)
    assert 0 <= trusted_s <= limits.UPSTREAM_IDLE_S_MAX
