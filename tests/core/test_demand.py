"""Demand of several workers, as one."""

from __future__ import annotations

from proxy.contract.demand import Demand, ModelDemand, ReplicaDemand, decode_demand, encode_demand
from proxy.core.demand import counted, sum_models, sum_replicas


def test_workers_are_summed_and_the_longest_wait_is_the_longest() -> None:
    one = ModelDemand(1, 10, 2, 20, 3.0, 4, 5, 6)
    assert sum_models(({"m": one}, {"m": one, "n": one}, {})) == {
        "m": ModelDemand(2, 20, 4, 40, 3.0, 8, 10, 12),
        "n": one,
    }
    assert sum_replicas(({"a": ReplicaDemand(1, 2, 1)}, {"a": ReplicaDemand(3, 4, 2)})) == {
        "a": ReplicaDemand(4, 6, 3)
    }


def test_of_one_that_died_only_what_it_had_counted_remains() -> None:
    left = counted({"m": ModelDemand(1, 10, 2, 20, 3.0, 4, 5)})
    assert left == {"m": ModelDemand(arrivals_total=4, refused_total=5)}


def test_a_report_reads_as_it_was_written() -> None:
    demand = Demand(
        proxy_id="p",
        sequence=3,
        models={"m": ModelDemand(queued=1)},
        replicas={"a": ReplicaDemand(1)},
        fleet_epoch="e",
        fleet_version=9,
    )
    assert decode_demand(encode_demand(demand)) == demand
