"""What regions ask of each other, as a proxy carries it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import PoolRecord
from proxy.contract.demand import Elsewhere
from proxy.contract.regions import (
    WANTED_AGE_S_MAX,
    ModelSummary,
    RegionSummary,
    RemoteState,
    Wanted,
)
from proxy.core.wanting import asked_of, elsewhere_of, summed, wanted_by

TOLD = ModelSummary(
    awake=1, free=3, coming=2, start_s=2.0, wakes=True, startable=4, carries=8.0, queued=1
)


def remote(
    name: str, *, linked: bool = True, draining: bool = False, **models: ModelSummary
) -> RemoteState:
    region = name.partition("#")[0]
    summary = RegionSummary(region=region, sequence=1, draining=draining, models=models)
    return RemoteState(
        name=name, region=region, url="http://x", linked=linked, round_trip_s=0.08, summary=summary
    )


def test_what_a_region_could_do_comes_a_round_trip_later() -> None:
    found = elsewhere_of([remote("us#0", m=TOLD), remote("us#1", m=ModelSummary())], {}, {}, {}, {})
    told = Elsewhere(start_s=2.08, startable=4, coming=2, free=3, carries=8.0)
    assert found == {"m": {"us": told}}, "its second proxy says the same, or is behind"


def test_who_is_away_or_starts_nothing_could_do_nothing() -> None:
    gone = [remote("us#0", linked=False, m=TOLD), remote("ap#0", draining=True, m=TOLD)]
    gone.append(RemoteState(name="sa#0", region="sa", url="http://x", linked=True))
    assert elsewhere_of(gone, {}, {}, {}, {}) == {}
    still = ModelSummary(awake=1, startable=3, start_s=0.0)
    found = elsewhere_of([remote("us#0", m=still)], {}, {}, {}, {})
    assert found == {"m": {"us": Elsewhere()}}


def test_residency_bounds_what_a_region_may_be_asked_for() -> None:
    both = [remote("us#0", m=TOLD), remote("ap#0", m=TOLD)]
    only = elsewhere_of(both, {}, {}, {}, {"m": frozenset({"eu", "ap"})})
    assert only["m"].keys() == {"ap"}
    found = elsewhere_of(both, {"m": 8}, {"m": {"us": 5}}, {"m": {"us": 6}}, {})["m"]
    assert (found["us"].share, found["us"].in_flight) == (0.25, 5)
    assert (found["ap"].share, found["ap"].in_flight) == (1.0, 0)
    stale = elsewhere_of(both, {"m": 1}, {}, {"m": {"us": 6}}, {})["m"]
    assert stale["us"].share == 0.0


def test_pools_of_a_model_ask_together_and_each_region_for_itself() -> None:
    pools = (
        PoolRecord(model="m", pool="a", wanted={"us": 8.0}),
        PoolRecord(model="m", pool="b", wanted={"us": 4.0, "ap": 1.0}),
        PoolRecord(model="n", pool="n"),
    )
    assert asked_of(pools, "us") == {"m": 12.0}
    assert asked_of(pools, "ap") == {"m": 1.0}
    assert asked_of(pools, "sa") == {}


def test_two_proxies_of_one_region_ask_for_the_same_and_the_old_for_nothing() -> None:
    heard = [
        (Wanted(region="eu", models={"m": 8.0}), 10.0),
        (Wanted(region="eu", models={"m": 5.0}), 11.0),
        (Wanted(region="ap", models={"m": 1.0}), 11.0),
        (Wanted(region="sa", models={"m": 9.0}), 11.0 - WANTED_AGE_S_MAX),
    ]
    assert wanted_by(heard, 11.5) == {"m": {"eu": 8.0, "ap": 1.0}}
    assert wanted_by(heard, 12.0 + WANTED_AGE_S_MAX) == {}


COUNTS = st.dictionaries(
    st.sampled_from("mn"), st.dictionaries(st.sampled_from(["us", "ap"]), st.integers(0, 9))
)


@given(st.lists(COUNTS, max_size=4))
def test_workers_counts_add_up_in_any_order(parts: list[dict[str, dict[str, int]]]) -> None:
    total = summed(parts)
    assert total == summed(reversed(parts))
    for model in "mn":
        for region in ("us", "ap"):
            each = [part.get(model, {}).get(region, 0) for part in parts]
            assert total.get(model, {}).get(region, 0) == sum(each)
