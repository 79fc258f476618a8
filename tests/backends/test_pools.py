"""A pool as the law, the arbiter and the proxies are told of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.ladder import Ladder, Rung, RungCost, Rungs
from backends.members import Member, Standing
from backends.pools import HANDED_S, Portion, Vessel, View, policy_of, pour
from backends.spec import pool_specs
from proxy.config import parse_config
from proxy.contract import LoadSample
from proxy.contract.demand import ModelDemand

SCALED = "{engine: simulator, target_inputs: 4, class: offline, autoscale: {min: 1, max: 3}}"


def view(*members: Member, pool: str = SCALED, portion: Portion | None = None) -> View:
    config = parse_config(f"models: [{{name: m, pools: [{pool}]}}]", "f")
    return View(
        pool=pool_specs(config)[0],
        members=members,
        portion=portion or Portion(),
        gpus_each=1,
        rungs=Rungs(launch_hash="h", engine="simulator", allowed=frozenset({Rung.ASLEEP})),
    )


def member(number: int, standing: Standing, rung: Rung = Rung.AWAKE, **more: object) -> Member:
    fields = {"launch_hash": "h", "keep_on": rung, "devices": (str(number),)} | more
    return Member(replica_id=f"m-{number}", standing=standing, rung=rung, **fields)  # type: ignore[arg-type]


def test_one_pool_takes_all_of_its_models_demand() -> None:
    demand = ModelDemand(in_flight=5, queued=3, queued_s=2.0, queued_tokens=70, arrivals_total=9)
    last = ModelDemand(arrivals_total=4)
    told = pour(demand, last, [Vessel("m", 8, scaled=True)], {"m": Portion(arrivals=10.0)})["m"]
    assert told == Portion(5, 3, 2.0, 70, 0, 15.0, 0.0)


def test_fixed_pools_carry_first_and_the_last_takes_the_rest() -> None:
    vessels = [Vessel("spot", 8, scaled=True), Vessel("more", 4, scaled=True)]
    vessels.insert(1, Vessel("base", 10, scaled=False))
    little = pour(ModelDemand(in_flight=9), ModelDemand(), vessels, {})
    assert [little[name].in_flight for name in ("base", "spot", "more")] == [9, 0, 0]
    much = pour(ModelDemand(in_flight=20, queued=20), ModelDemand(), vessels, {})
    got = {name: much[name].in_flight + much[name].queued for name in much}
    assert got == {"base": 10, "spot": 8, "more": 22}
    assert little["spot"].queued_s == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 9)), max_size=20),
    st.lists(st.floats(0, 30), min_size=1, max_size=4),
)
def test_portions_of_counters_only_grow_and_add_up(
    steps: list[tuple[int, int, int]], carries: list[float]
) -> None:
    vessels = [Vessel(str(n), most, scaled=n % 2 == 1) for n, most in enumerate(carries)]
    last, before = ModelDemand(), {str(n): Portion() for n in range(len(carries))}
    for in_flight, queued, arrivals in steps:
        total = last.arrivals_total + arrivals
        demand = ModelDemand(in_flight=in_flight, queued=queued, arrivals_total=total)
        after = pour(demand, last, vessels, before)
        assert all(after[name].arrivals >= before[name].arrivals for name in before)
        assert abs(sum(p.arrivals for p in after.values()) - total) < 1e-6
        last, before = demand, after


def test_the_policy_is_the_configurations() -> None:
    policy = policy_of(view().pool)
    assert policy is not None
    assert (policy.min, policy.max, policy.target_inputs) == (1, 3, 4.0)
    assert policy_of(view(pool="{engine: simulator}").pool) is None
    limited = policy_of(view(pool="{engine: simulator, max_inputs: 6, autoscale: {max: 1}}").pool)
    assert limited is not None
    assert limited.target_inputs == 6.0, "where no target is named, the most is aimed at"


def test_what_comes_is_expected_after_what_it_usually_takes() -> None:
    ladder = Ladder()
    ladder.learn("h", "m-9", {Rung.COLD: RungCost(15.0)})
    seen = view(
        member(0, Standing.SERVES, load=LoadSample(at_s=0.0, kv_used_ratio=0.5), for_s=9.0),
        member(1, Standing.COMING, for_s=5.0),
        member(2, Standing.COMING, for_s=40.0),
        member(3, Standing.GOING, Rung.ASLEEP),
        portion=Portion(in_flight=4, queued=2),
    )
    told = seen.observation(ladder, 100.0, gpu_limit=2)
    assert (told.ready, told.coming_in_s, told.start_s) == (1, (0.0, 10.0), 15.0)
    assert (told.in_flight, told.queued, told.kv_used_ratio, told.gpu_limit) == (4, 2, 0.5, 2)
    record = seen.record(ladder, 100.0)
    assert (record.awake, record.coming, record.ready_in_s, record.start_s) == (1, 2, 0.0, 15.0)
    assert (record.wakes, record.work_class) == (True, "offline")


def test_what_waited_for_one_that_has_just_come_up_waits_no_more() -> None:
    """The reports are from before; by them one more would be started for what is being served."""
    portion = Portion(in_flight=1, queued=5, queued_tokens=70, in_flight_tokens=3)
    for for_s, told in ((0.2, (6, 0, 73, 0)), (HANDED_S, (1, 5, 3, 70))):
        seen = view(member(0, Standing.SERVES, for_s=for_s), portion=portion)
        at = seen.observation(Ladder(), 9.0, None)
        assert (at.in_flight, at.queued, at.in_flight_tokens, at.queued_tokens) == told


def test_one_at_rest_is_the_quickest_way_up() -> None:
    ladder = Ladder()
    claim = view(member(0, Standing.RESTS, Rung.ASLEEP)).claim(ladder, 0.0, desired=1)
    assert (claim.ways_up[0].replica_id, claim.ways_up[0].rung) == ("m-0", Rung.ASLEEP)
    assert claim.ways_up[-1].replica_id is None
    assert claim.serving == ()


def test_what_an_operator_holds_counts_for_nothing_and_is_let_be() -> None:
    seen = view(member(0, Standing.HELD), member(1, Standing.SERVES))
    claim = seen.claim(Ladder(), 0.0, desired=2)
    assert (claim.desired, claim.min) == (3, 2)
    assert [holder.kept for holder in claim.holders] == [True, False]


def test_a_fixed_pool_claims_what_it_was_told_and_keeps_its_sleepers() -> None:
    seen = view(
        member(0, Standing.SERVES),
        member(1, Standing.RESTS, Rung.ASLEEP),
        pool="{engine: simulator, replicas: 2}",
    )
    claim = seen.claim(Ladder(), 0.0, desired=2)
    assert (claim.desired, claim.min) == (1, 1)
    assert [holder.kept for holder in claim.holders] == [False, True]
    assert all(way.replica_id is None for way in claim.ways_up)


def test_a_share_of_scarce_cards_follows_the_pools_weight() -> None:
    seen = view(pool=SCALED.replace("class", "weight: 2.5, class"))
    assert seen.claim(Ladder(), 0.0, desired=1).weight == 2.5


def test_one_that_is_suspended_has_no_cards_and_one_that_is_gone_is_none() -> None:
    seen = view(member(0, Standing.RESTS, Rung.SUSPENDED), member(1, Standing.GONE, Rung.COLD))
    (holder,) = seen.claim(Ladder(), 0.0, desired=0).holders
    assert (holder.replica_id, holder.devices) == ("m-0", ())
