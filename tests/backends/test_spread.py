"""What is short in one region is started once: where it comes up soonest."""

from __future__ import annotations

import itertools

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from backends.observation import Observation, ScalingPolicy
from backends.scaling import Scaler
from backends.spread import HOLD_S, PATIENCE_S, Here, Spreading
from proxy.contract.demand import Elsewhere

CARRIES = 8.0


def here(
    at_s: float = 0.0,
    short: float = 16.0,
    *,
    startable: int = 4,
    start_s: float = 15.0,
) -> Here:
    return Here(at_s, short, CARRIES, startable, start_s)


def other(start_s: float = 15.0, startable: int = 4, **more: float) -> Elsewhere:
    return Elsewhere(start_s=start_s, startable=startable, carries=CARRIES, **more)  # type: ignore[arg-type]


def test_nobody_is_asked_for_what_comes_up_here_as_soon() -> None:
    for start_s in (60.0, 15.0, 14.6, 12.0):  # a little sooner is not sooner
        assert Spreading().share(here(), {"us": other(start_s)}) == {}


def test_the_soonest_starts_first_and_the_rest_where_it_comes_up_next() -> None:
    others = {"us": other(2.0, 1), "ap": other(3.0, 1), "sa": other(60.0, 9)}
    assert Spreading().share(here(short=32.0), others) == {"us": 8.0, "ap": 8.0}
    assert Spreading().share(here(short=64.0), others) == {"us": 8.0, "ap": 8.0, "sa": 16.0}


def test_what_cannot_be_started_here_is_another_regions_however_late() -> None:
    assert Spreading().share(here(startable=1), {"us": other(60.0)}) == {"us": 8.0}


def test_a_region_of_which_nothing_could_be_started_is_asked_for_nothing() -> None:
    assert Spreading().share(here(startable=0), {"us": other(2.0, 0)}) == {}
    assert Spreading().share(here(startable=0), {"us": other(2.0, 1)}) == {"us": 8.0}


def test_no_more_goes_than_may_be_computed_there() -> None:
    assert Spreading().share(here(startable=0), {"us": other(2.0, share=0.25)}) == {"us": 4.0}
    assert Spreading().share(here(startable=0), {"us": other(2.0, share=0.0)}) == {}


def test_what_was_given_stays_and_is_not_given_again() -> None:
    spreading = Spreading()
    first = spreading.share(here(startable=0), {"us": other(2.0)})
    assert first == {"us": 16.0}
    told = {"us": other(2.0, 2, coming=2), "ap": other(1.0)}
    assert spreading.share(here(1.0, startable=4), told) == first, "nor elsewhere, if sooner now"
    assert spreading.share(here(2.0, 24.0, startable=0), told) == {"us": 16.0, "ap": 8.0}


def test_what_begins_there_is_asked_for_no_more() -> None:
    spreading = Spreading()
    spreading.share(here(startable=0), {"us": other(2.0)})
    served = {"us": other(2.0, in_flight=6)}
    assert spreading.share(here(1.0, 10.0, startable=0), served) == {"us": 10.0}
    assert spreading.share(here(2.0, 10.0, startable=0), served) == {"us": 10.0}
    ends = {"us": other(2.0, in_flight=0)}
    assert spreading.share(here(3.0, 10.0, startable=0), ends) == {"us": 10.0}


def test_less_that_is_short_for_a_moment_moves_nobody() -> None:
    spreading = Spreading()
    told = {"us": other(2.0, 2, coming=2)}
    for at_s, short, given_ in ((0, 16, 16), (1, 3, 16), (9, 12, 16), (11, 3, 12), (30, 0, 0)):
        want = {"us": float(given_)} if given_ else {}
        assert spreading.share(here(float(at_s), float(short), startable=0), told) == want, at_s
    assert HOLD_S == 10.0  # what the table above is of


def test_a_region_that_is_not_heard_of_or_offers_nothing_is_left() -> None:
    spreading = Spreading()
    spreading.share(here(startable=0), {"us": other(2.0)})
    assert spreading.share(here(1.0), {}) == {}
    spreading = Spreading()
    spreading.share(here(startable=0), {"us": other(2.0)})
    full = {"us": other(2.0, 0)}
    assert spreading.share(here(PATIENCE_S - 0.1), full) == {"us": 16.0}, "it may be ordering them"
    assert spreading.share(here(PATIENCE_S + 0.1), full) == {}
    assert spreading.share(here(PATIENCE_S + 1.0, startable=0), {"us": other(2.0)}) == {"us": 16.0}


REGIONS = st.dictionaries(
    st.sampled_from(["us", "ap", "sa"]),
    st.builds(
        Elsewhere,
        start_s=st.floats(0.0, 90.0),
        startable=st.integers(0, 6),
        coming=st.integers(0, 3),
        free=st.integers(0, 3),
        in_flight=st.integers(0, 30),
        carries=st.sampled_from([0.0, 4.0, 8.0]),
        share=st.floats(0.0, 1.0),
    ),
    max_size=3,
)
STEPS = st.tuples(st.floats(0.0, 200.0), st.integers(0, 6), REGIONS)


@given(st.lists(STEPS, max_size=12))
def test_never_more_is_given_than_was_short_nor_to_one_that_is_not_there(
    steps: list[tuple[float, int, dict[str, Elsewhere]]],
) -> None:
    spreading, again = Spreading(), Spreading()
    shorts: list[float] = []
    for second, (short, startable, others) in enumerate(steps):
        shorts.append(short)
        seen = here(float(second), short, startable=startable)
        given_ = spreading.share(seen, others)
        assert given_ == again.share(seen, dict(reversed(others.items())))
        assert given_.keys() <= others.keys()
        assert sum(given_.values()) <= max(shorts[-int(HOLD_S) :]) + 1e-6
        assert all(inputs > 0.0 for inputs in given_.values())


# --- the law of two regions that share ------------------------------------------------------------

POLICY = ScalingPolicy(min=0, max=8, target_inputs=8.0, max_inputs=12)


def quiet(policy: ScalingPolicy = POLICY) -> Scaler:
    scaler = Scaler(policy)
    for second in range(1, 121):
        scaler.decide(Observation(at_s=float(second), start_s=60.0))
    return scaler


def test_the_first_request_is_left_to_the_region_that_is_sooner() -> None:
    seen = Observation(at_s=121.0, queued=1, arrivals_total=1, start_s=60.0)
    assert quiet().decide(seen).desired == 1
    decided = quiet().decide(msgspec.structs.replace(seen, elsewhere={"us": other(2.0)}))
    assert (decided.desired, decided.away) == (0, {"us": 1.0}), "no more than is there"
    assert decided.reason.endswith("; 0.1 left to us")


def test_what_another_region_asks_for_is_started_and_kept() -> None:
    scaler = quiet()
    decided = scaler.decide(Observation(at_s=121.0, wanted=20.0, start_s=2.0))
    assert (decided.desired, decided.away) == (3, {})
    assert decided.reason.endswith("; 2.5 of it for other regions")
    held = [
        scaler.decide(Observation(at_s=float(at_s), wanted=20.0, ready=3, start_s=2.0)).desired
        for at_s in range(122, 200)
    ]
    assert set(held) == {3}
    gone = [
        scaler.decide(Observation(at_s=float(at_s), ready=3, start_s=2.0)).desired
        for at_s in range(200, 300)
    ]
    assert gone[-1] < 3, "and let go when it is asked for no more"


def test_what_others_ask_for_is_not_passed_on() -> None:
    told = {"us": other(1.0)}
    decided = quiet().decide(Observation(at_s=121.0, wanted=80.0, start_s=60.0, elsewhere=told))
    assert (decided.desired, decided.away) == (8, {})


def test_nobody_is_asked_where_nobody_waits() -> None:
    """One replica, which is all there can be, and a load above its target that it takes."""
    scaler, told = Scaler(msgspec.structs.replace(POLICY, max=1)), {"us": other(2.0)}
    for second in range(1, 180):
        seen = Observation(
            at_s=float(second),
            in_flight=11,
            arrivals_total=3 * second,
            ready=1,
            start_s=60.0,
            elsewhere=told,
        )
        decided = scaler.decide(seen)
        assert decided.away == {}
    assert decided.terms["need"] > 1.2
    waits = msgspec.structs.replace(seen, at_s=180.0, queued=4, arrivals_total=544)
    assert decided.away == {}
    assert scaler.decide(waits).away["us"] > 2.0


def test_a_burst_is_started_once_over_both() -> None:
    """Here four can be started, and all that is needed beyond them is another's to start."""
    policy = msgspec.structs.replace(POLICY, max=4)
    scaler, told = quiet(policy), {"us": other(60.0, 20)}
    arrivals = itertools.accumulate([30] * 8)
    for second, total in enumerate(arrivals):
        seen = Observation(
            at_s=121.0 + second,
            queued=total,
            arrivals_total=total,
            start_s=60.0,
            coming_in_s=(60.0,) * 4 if second else (),
            elsewhere=told,
        )
        decided = scaler.decide(seen)
        need = decided.terms["need"]
        assert decided.desired == min(4, 4 if second else need.__ceil__())
        assert sum(decided.away.values()) / 8.0 <= max(0.0, need - 4) + 1e-6
    assert sum(decided.away.values()) / 8.0 > 1.0
