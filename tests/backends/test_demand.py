"""Reports of proxies, summed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.demand import DOUBT_S, PROXIES_MAX, REGIONS_MAX, DemandBook
from proxy.contract import FleetSnapshot, ReplicaRecord, ReplicaState
from proxy.contract.demand import (
    DEMAND_AGE_S_MAX,
    Demand,
    Elsewhere,
    ModelDemand,
    ReplicaDemand,
    decode_demand,
)


def book(now: list[float] | None = None) -> DemandBook:
    made = DemandBook(lambda: now[0] if now else 0.0)
    made.serve({"m", "n"})
    made.publish(fleet(1))
    return made


def report(
    proxy_id: str, sequence: int, replicas: dict[str, ReplicaDemand] | None = None, **m: float
) -> Demand:
    models = {"m": ModelDemand(**m)}  # type: ignore[arg-type]
    return Demand(proxy_id=proxy_id, sequence=sequence, models=models, replicas=replicas or {})


def test_the_newest_of_each_proxy_is_summed() -> None:
    made = book()
    assert made.take(report("a", 1, in_flight=3, queued=2, queued_s=1.5, queued_tokens=10), 0.0)
    assert made.take(report("b", 1, in_flight=1, queued=1, queued_s=4.0), 0.1)
    assert made.take(report("a", 2, in_flight=5, queued_s=0.5), 0.5)
    told = made.of("m")
    assert (told.in_flight, told.queued, told.queued_s, told.queued_tokens) == (6, 1, 4.0, 0)
    assert made.of("n") == ModelDemand()


def test_one_that_says_that_it_has_ended_is_waited_for_no_longer() -> None:
    made = book([0.0])
    made.take(report("a", 1, {"m-0": ReplicaDemand(in_flight=3)}, in_flight=3), 0.0)
    draining = ReplicaRecord(replica_id="m-0", url="http://x", state=ReplicaState.DRAINING)
    made.publish(FleetSnapshot(epoch="e", version=2, replicas=(draining,)))
    assert made.in_flight("m-0") == 3
    counted = {"m": ModelDemand(arrivals_total=9)}
    assert made.take(Demand(proxy_id="a", sequence=2, models=counted, last=True), 0.1)
    assert (made.in_flight("m-0"), made.proxies) == (None, 0)
    assert made.of("m") == ModelDemand(arrivals_total=9), "what it counted last is counted"


def test_what_may_have_only_what_is_spare_holds_its_replica_and_is_told_apart() -> None:
    made = book()
    for proxy, spare in (("a", 2), ("b", 1)):
        replicas = {"m-0": ReplicaDemand(in_flight=3, spare=spare)}
        made.take(report(proxy, 1, replicas, in_flight=3 - spare, spare=spare), 0.0)
    assert (made.in_flight("m-0"), made.spare("m-0"), made.spare("m-1")) == (6, 3, 0)
    told = made.of("m")
    assert (told.in_flight, told.spare) == (3, 3)


def test_an_older_report_that_comes_late_is_dropped() -> None:
    made = book()
    made.take(report("a", 5, in_flight=1), 0.0)
    assert not made.take(report("a", 4, in_flight=9), 0.1)
    assert made.of("m").in_flight == 1


def test_a_silent_proxy_is_gone_and_its_requests_with_it() -> None:
    now = [0.0]
    made = book(now)
    made.take(report("a", 1, in_flight=3, replicas={"m-0": ReplicaDemand(in_flight=3)}), 0.0)
    made.take(report("b", 1, in_flight=1), 3.0)
    now[0] = DEMAND_AGE_S_MAX + 0.1
    made.expire(now[0])
    assert (made.of("m").in_flight, made.in_flight("m-0"), made.proxies) == (1, 0, 1)
    now[0] = 20.0
    made.expire(now[0])
    assert (made.of("m").in_flight, made.in_flight("m-0")) == (0, None)


def test_counters_only_grow() -> None:
    """Over the end of a proxy, its restart under the same id, and one that was there before."""
    made = book()
    made.take(report("a", 1, arrivals_total=4, refused_total=1), 0.0)
    made.take(report("a", 2, arrivals_total=10), 0.5)
    made.take(report("old", 700, arrivals_total=100_000), 0.5)  # history of a former manager
    assert made.of("m").arrivals_total == 10
    made.take(report("old", 701, arrivals_total=100_003), 1.0)
    assert made.of("m").arrivals_total == 13
    made.expire(60.0)
    made.take(report("a", 1, arrivals_total=2), 60.0)
    assert (made.of("m").arrivals_total, made.of("m").refused_total) == (15, 1)


def test_what_other_regions_ask_and_offer_is_not_summed_over_proxies() -> None:
    made = book()
    first = Demand(
        proxy_id="a",
        sequence=1,
        wanted={"m": {"eu": 4.0}, "unknown": {"eu": 9.0}},
        elsewhere={"m": {"us": Elsewhere(start_s=2.0, startable=3, in_flight=2, share=0.5)}},
    )
    second = Demand(
        proxy_id="b",
        sequence=1,
        wanted={"m": {"eu": 5.0, "ap": 1.0}},
        elsewhere={"m": {"us": Elsewhere(start_s=2.5, startable=1, in_flight=1)}},
    )
    made.take(first, 0.0)
    made.take(second, 0.1)
    assert made.wanted("m") == {"eu": 5.0, "ap": 1.0}
    assert made.wanted("unknown") == {}
    together = Elsewhere(start_s=2.5, startable=1, in_flight=3, share=0.5)
    assert made.elsewhere("m") == {"us": together}
    made.expire(DEMAND_AGE_S_MAX + 1.0)
    assert (made.wanted("m"), made.elsewhere("m")) == ({}, {})


def test_a_report_keeps_only_so_many_regions() -> None:
    made = book()
    many = {f"r{number}": 1.0 for number in range(2 * REGIONS_MAX)}
    made.take(Demand(proxy_id="a", sequence=1, wanted={"m": many}), 0.0)
    assert len(made.wanted("m")) == REGIONS_MAX


def fleet(version: int, state: str = "ready", asleep: bool = False) -> FleetSnapshot:
    record = ReplicaRecord(
        replica_id="m-0", url="http://127.0.0.1:1", state=ReplicaState(state), asleep=asleep
    )
    return FleetSnapshot(epoch="e", version=version, replicas=(record,))


def known(sequence: int, version: int, epoch: str = "e", proxy_id: str = "a") -> Demand:
    return Demand(proxy_id=proxy_id, sequence=sequence, fleet_epoch=epoch, fleet_version=version)


def test_a_count_from_before_the_draining_was_known_is_no_count_of_none() -> None:
    """A worker that had not heard of it may just have sent a request there."""
    made = book()
    made.publish(fleet(4))
    made.take(known(1, 4), 0.0)
    assert made.in_flight("m-0") == 0
    made.publish(fleet(5, "draining"))
    made.publish(fleet(6, "draining"))
    assert made.in_flight("m-0") == 1
    made.take(known(2, 5), 0.5)
    assert made.in_flight("m-0") == 0
    made.take(known(1, 9, epoch="of a former manager", proxy_id="b"), 0.5)
    assert made.in_flight("m-0") == 1
    made.take(known(2, 6, proxy_id="b"), 0.6)
    assert made.in_flight("m-0") == 0
    made.take(known(3, 0, epoch="", proxy_id="b"), 0.6)
    assert made.in_flight("m-0") == 1, "a worker of it has not said what it knows"


def test_one_that_says_no_more_is_doubted_for_a_while_only() -> None:
    """A proxy that is being stopped would else hold up the stop of every replica."""
    now = [0.0]
    made = book(now)
    made.take(known(1, 4), 0.0)
    made.publish(fleet(5, "draining"))
    assert made.in_flight("m-0") == 1
    now[0] = DOUBT_S + 0.1
    assert made.in_flight("m-0") == 0
    now[0] = DEMAND_AGE_S_MAX + 0.1
    assert made.in_flight("m-0") is None


def test_one_that_comes_back_is_forgotten_and_one_asleep_takes_nothing() -> None:
    made = book()
    made.take(known(1, 4), 0.0)
    made.publish(fleet(5, asleep=True))
    assert made.in_flight("m-0") == 1
    made.publish(fleet(6))
    assert made.in_flight("m-0") == 0
    made.publish(fleet(7, "draining"))
    made.take(known(2, 6), 0.1)
    assert made.in_flight("m-0") == 1


@pytest.mark.parametrize(
    "told",
    [
        '"models": {"m": {"in_flight": -1}}',
        '"models": {"m": {"queued_s": -0.5}}',
        '"models": {"m": {"arrivals_total": -3}}',
        '"replicas": {"m-0": {"tokens": -1}}',
        f'"models": {{"m": {{"queued": {"9" * 400}}}}}',
        '"models": ' + '{"m":' * 9_000,
        f'"fleet_epoch": "{"e" * 200}"',
    ],
    ids=lambda told: told[:40],
)
def test_what_counts_less_than_nothing_or_beyond_reason_is_no_report(told: str) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_demand(f'{{"proxy_id": "a", "sequence": 1, {told}}}'.encode())


def test_what_is_told_of_replicas_that_there_are_not_is_not_kept() -> None:
    made = book()
    replicas = {name: ReplicaDemand(in_flight=2) for name in ("m-0", "x")}
    made.take(report("a", 1, replicas=replicas), 0.0)
    assert (made.in_flight("m-0"), made.in_flight("x")) == (2, 0)


def test_names_that_no_pool_has_and_too_many_proxies_leave_nothing() -> None:
    made = book()
    made.take(Demand(proxy_id="a", sequence=1, models={"x": ModelDemand(in_flight=9)}), 0.0)
    assert made.of("x") == ModelDemand()
    for number in range(2 * PROXIES_MAX):
        made.take(report(f"p{number}", 1, in_flight=1), 0.0)
    assert made.of("m").in_flight == PROXIES_MAX - 1
    made.serve({"n"})
    assert made.of("m").arrivals_total == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 50), st.floats(0, 4)),
        max_size=60,
    )
)
def test_arrivals_never_fall(reports: list[tuple[str, int, int, float]]) -> None:
    made, now_s, last = book(), 0.0, 0
    for proxy_id, sequence, arrivals, pause_s in reports:
        now_s += pause_s
        made.take(report(proxy_id, sequence, arrivals_total=arrivals), now_s)
        assert made.of("m").arrivals_total >= last
        last = made.of("m").arrivals_total
