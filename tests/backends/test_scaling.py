"""The control law: what each situation asks for, and what holds in all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends.scaling import Decision, Observation, Scaler, ScalingPolicy

POLICY = ScalingPolicy(min=0, max=40, target_inputs=8.0, max_inputs=12)


def steady(
    rate: float,
    *,
    stay_s: float = 4.0,
    ready: int = 1,
    start_s: float = 15.0,
    first_s: int = 1,
    last_s: int = 120,
    before: int = 0,
) -> Iterator[Observation]:
    """Yield a pool once a second that serves `rate` requests a second, each in `stay_s`."""
    for second in range(first_s, last_s + 1):
        yield Observation(
            at_s=float(second),
            in_flight=round(rate * min(stay_s, second - first_s + 1)),
            arrivals_total=before + round(rate * (second - first_s + 1)),
            ready=ready,
            start_s=start_s,
        )


def after(scaler: Scaler, seen: Iterator[Observation]) -> Decision:
    decision = Decision(desired=-1)
    for observation in seen:
        decision = scaler.decide(observation)
    return decision


@pytest.mark.parametrize(("rate", "replicas"), [(0.0, 0), (1.0, 1), (4.0, 2), (20.0, 10)])
def test_a_steady_load_has_what_it_needs(rate: float, replicas: int) -> None:
    decision = after(Scaler(POLICY), steady(rate, ready=replicas))
    assert decision.desired == replicas
    assert not decision.panicking


def test_a_step_is_answered_within_three_seconds_and_not_beyond_its_need() -> None:
    scaler = Scaler(POLICY)
    after(scaler, steady(1.0))
    flood = list(steady(10.0, first_s=121, last_s=180, before=120))
    asked = [scaler.decide(one).desired for one in flood]
    assert asked[2] >= 3
    assert asked[5] >= 4
    assert max(asked) <= 6
