"""What the manager of one region asks reaches the manager of another, and ends with the path."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from proxy.contract import FleetSnapshot, PoolRecord
from proxy.contract.demand import Demand, ModelDemand
from proxy.contract.regions import ModelSummary, Wanted, encode_wanted
from proxy.core import peer_wire, wanting
from proxy.io import wanting as wanting_io
from proxy.io.control import Demanded
from proxy.io.teller import Teller
from proxy.io.wanting import Wanting
from tests.fakes.plane import until
from tests.io.test_regions import Proxy, _soon, two  # noqa: F401

SETTLED_S = 0.1  # both dial each other, and one of the two links goes
TOLD = {"m": ModelSummary(wakes=True, startable=3, start_s=2.0, carries=4.0)}


class Side:
    """One region: its proxy, and what it would report to its manager."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.proxy.models = TOLD
        self.teller = Teller(aiohttp.ClientSession)
        self.wanting = Wanting(proxy.peers, proxy.regions, self.teller)
        self.wanting.look(proxy.config)
        proxy.tasks.start("wanted", self.wanting.run())

    def report(self) -> Demand:
        return self.teller.demand()

    def decide(self, **wanted: float) -> None:
        """Have the manager here ask this of other regions."""
        pools = (PoolRecord(model="m", pool="m", wanted=wanted),)
        self.wanting.know(FleetSnapshot(epoch="e", version=1, pools=pools))


@contextlib.asynccontextmanager
async def sides() -> AsyncIterator[tuple[Side, Side]]:
    async with two() as (eu, us):
        await until(lambda: bool(eu.linked and us.linked))
        yield Side(eu), Side(us)
        await asyncio.sleep(SETTLED_S)


async def test_what_one_manager_asks_the_other_is_told_at_once_and_until_it_ends() -> None:
    async with sides() as (eu, us):
        assert us.report().wanted == {}
        us.teller._urgent.clear()
        eu.decide(us=8.0, ap=3.0)
        await until(lambda: us.report().wanted == {"m": {"eu": 8.0}})
        assert us.teller._urgent.is_set(), "it is not to wait for the next report"
        assert eu.report().wanted == {}
        gauges = {(s.name, s.labels): s.value for s in eu.wanting.samples()}
        assert gauges["wanted_elsewhere_inputs", (("model", "m"), ("region", "us"))] == 8.0
        eu.decide()
        await until(lambda: us.report().wanted == {})


async def test_each_manager_is_told_what_the_other_could_start() -> None:
    async with sides() as (eu, _):
        await until(lambda: "m" in eu.report().elsewhere)
        await until(lambda: eu.report().elsewhere["m"]["us"].startable == 3)
        eu.teller.join(1)
        waits = {"m": ModelDemand(queued=4)}
        eu.teller.hear(1, Demanded(waits, {}, abroad={"m": {"us": 2}}, bound={"m": {"us": 1}}))
        told = eu.report().elsewhere["m"]["us"]
        assert (told.in_flight, told.share, told.carries) == (2, 0.75, 4.0)
        assert told.start_s >= 2.0


async def test_a_path_that_is_cut_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanting, "WANTED_AGE_S_MAX", 0.1)
    async with sides() as (eu, us):
        eu.decide(us=8.0)
        await until(lambda: us.report().wanted == {"m": {"eu": 8.0}})
        await eu.proxy.tasks.close()
        await until(lambda: us.report().wanted == {} and us.report().elsewhere == {})


async def test_what_stays_true_is_said_again_however_often_the_fleet_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wanting_io, "WANTED_INTERVAL_S", 0.05)
    monkeypatch.setattr(wanting, "WANTED_AGE_S_MAX", 0.5)
    async with sides() as (eu, us):
        eu.decide(us=8.0)
        await until(lambda: us.report().wanted == {"m": {"eu": 8.0}})
        for _ in range(50):
            eu.decide(us=8.0)  # another snapshot, and the same decision
            await asyncio.sleep(0.02)
            assert us.report().wanted == {"m": {"eu": 8.0}}


@pytest.mark.parametrize(
    "octets",
    [
        b"no message",
        encode_wanted(Wanted(region="ap", models={"m": 1.0})),
        msgspec.msgpack.encode({"region": "us", "models": {"m": -1.0}}),
        msgspec.msgpack.encode({"region": "us", "models": {"m": float("nan")}}),
    ],
)
async def test_what_is_no_demand_ends_the_link(octets: bytes) -> None:
    async with sides() as (eu, us):
        (link,) = us.proxy.peers.links(abroad=True)
        link.send(peer_wire.write_message(peer_wire.WANTED, octets))
        await until(lambda: eu.proxy.failures("broken") == 1)
        await asyncio.sleep(0)
        assert eu.report().wanted == {}
