"""Demand that has left for another region is none here, and what comes back is demand again."""

from __future__ import annotations

from collections.abc import Callable

from proxy.contract import PoolRecord
from proxy.contract.demand import ModelDemand
from proxy.contract.regions import ModelSummary
from proxy.io.control import Demanded
from proxy.io.tally import Tally, demand_of
from tests.fakes.hub import FakeChannel
from tests.fakes.plane import CHAT_BODY, Bench, answer, chat_request
from tests.io.test_abroad import bound, busy, told

MakeBench = Callable[..., Bench]


def of_model(bench: Bench) -> ModelDemand:
    return demand_of(bench.plane).models["m"]


async def test_what_left_is_no_arrival_here_and_counts_where_it_is(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(region="eu")
    told(bench)
    await busy(bench)
    client, engine = await bench.begun()
    assert engine.replica_id == "us#0"
    assert (of_model(bench).arrivals_total, of_model(bench).in_flight) == (1, 1)
    assert demand_of(bench.plane).abroad == {"m": {"us": 1}}
    engine.send(answer())
    assert client.answer().status == 200
    assert of_model(bench).arrivals_total == 1, "it was served there"
    assert demand_of(bench.plane).abroad == {}


async def test_what_comes_back_unserved_is_ours_again(make_bench: MakeBench) -> None:
    bench = make_bench(region="eu")
    told(bench)
    await busy(bench)
    bench.upstreams.refusing.add("us#0")
    bench.client().send(chat_request())
    await bench.settle()
    assert of_model(bench).arrivals_total == 2
    assert demand_of(bench.plane).abroad == {}


async def test_those_who_wait_and_may_not_leave_are_told_apart(make_bench: MakeBench) -> None:
    bench = make_bench(region="eu")
    told(bench, said=ModelSummary(awake=2, free=0))
    await busy(bench)
    bench.client().send(chat_request(CHAT_BODY))
    await bench.settle()
    bound(bench, "eu", "ap")
    bench.client().send(chat_request(CHAT_BODY))
    await bench.settle()
    assert of_model(bench).queued == 2
    assert demand_of(bench.plane).bound == {"m": {"us": 1}}


async def test_no_counter_falls_when_one_that_waited_leaves(make_bench: MakeBench) -> None:
    bench = make_bench(region="eu", manager_url="http://127.0.0.1:1")
    channel = FakeChannel()
    tally = Tally(bench.plane, channel)
    told(bench, said=ModelSummary(awake=2, free=0))
    await busy(bench)
    bench.client().send(chat_request(CHAT_BODY))
    await bench.settle()
    tally._tell(at_once=True)
    told(bench)
    await bench.engine()
    tally._tell(at_once=True)
    await bench.begun(chat_request(CHAT_BODY))
    tally._tell(at_once=True)
    reports = channel.heard(Demanded)
    assert [one.models["m"].arrivals_total for one in reports] == [2, 2, 2]
    assert [one.abroad.get("m", {}) for one in reports] == [{}, {"us": 1}, {"us": 2}]


async def test_where_nothing_is_awake_no_more_leave_than_begin_at_once(
    make_bench: MakeBench,
) -> None:
    """The others wait here, from where they may still go to whichever region has room first."""
    bench = make_bench((), region="eu")
    bench.publish(pools=(PoolRecord(model="m", pool="m", wakes=True, start_s=20.0),))
    told(bench, said=ModelSummary(awake=1, free=2))
    for _ in range(5):
        bench.client().send(chat_request())
    await bench.settle()
    assert demand_of(bench.plane).abroad == {"m": {"us": 2}}
    assert bench.plane.waiting.count == 3
    bench.clock.advance(1.0)
    told(bench, said=ModelSummary(awake=1, free=1))
    await bench.settle()
    assert demand_of(bench.plane).abroad == {"m": {"us": 3}}
    assert bench.plane.waiting.count == 2
