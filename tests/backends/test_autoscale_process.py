"""Pools that are scaled, over real managers, engines and a client that reports like a proxy."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.scaling_report import PoolReport, decode_report
from proxy.contract import FleetSnapshot
from proxy.contract.demand import Demand, ModelDemand, encode_demand
from tests.fakes.region import Region, alive, until

pytestmark = pytest.mark.faults
WINDOWS = {"stable_window_secs": 4, "panic_window_secs": 1, "scaledown_window_secs": 1}


class Scaled(Region):
    """A region whose proxy is this test."""

    sequence = 0
    arrivals = 0

    def write_scaled(self, least: int = 0, most: int = 3, **pool: Any) -> None:
        scale = {"min": least, "max": most, "rungs": ["cold"], **WINDOWS}
        self.write(autoscale=scale, target_inputs=2, **pool)

    def post(self, path: str, body: bytes = b"") -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, method="POST")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)

    def report(self, queued: int, arrived: int = 0) -> None:
        self.sequence += 1
        self.arrivals += arrived
        told = {"m": ModelDemand(queued=queued, arrivals_total=self.arrivals)}
        demand = Demand(proxy_id="test", sequence=self.sequence, models=told)
        self.post("/v1/demand", encode_demand(demand))

    def pool(self) -> PoolReport:
        url = f"http://127.0.0.1:{self.port}/v1/scaling"
        with urllib.request.urlopen(url, timeout=5) as page:
            return decode_report(page.read()).pools[0]

    def up(self) -> FleetSnapshot:
        """Wait until the manager answers."""
        return until(self.fleet, "the manager")

    def count(self, ready: int, queued: int, arrived: int = 0) -> None:
        """Report until exactly so many are ready and no others are there."""

        def look() -> bool:
            self.report(queued, arrived)
            pool = self.pool()
            return (pool.ready, pool.coming, pool.going) == (ready, 0, 0)

        until(look, f"{ready} ready; the log:\n{self.log}")


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Scaled]:
    region = Scaled(tmp_path)
    yield region
    region.clean()


def test_from_nothing_up_over_a_killed_manager_and_down_to_nothing(region: Scaled) -> None:
    region.write_scaled(most=2)
    first = region.start()
    assert region.up().replicas == ()
    assert region.up().pools[0].wakes
    region.count(2, queued=9, arrived=9)
    before = {record.replica_id: record.pid for record in region.replicas("ready", 2)}
    first.kill()
    first.wait()
    second = region.start()
    after = {record.replica_id: record.pid for record in region.replicas("ready", 2)}
    assert after == before, "adopted, not sent home before the load was known"
    region.count(0, queued=0)
    events = [json.loads(line) for line in region.log.splitlines()]
    changes = [event for event in events if event["event"] == "scaling"]
    assert all({"was", "desired", "reason", "terms", "moves"} <= set(each) for each in changes)
    assert max(each["desired"] for each in changes) == 2
    second.terminate()
    assert second.wait(30) == 0
    assert not any(alive(pid) for pid in before.values())


def test_the_least_comes_back_when_it_is_killed_and_sighup_raises_it(region: Scaled) -> None:
    region.write_scaled(least=1)
    manager = region.start()
    (only,) = region.replicas("ready")
    os.kill(only.pid, signal.SIGKILL)
    until(lambda: "replica_backoff" in region.log, "the death")
    region.replicas("ready")
    region.write_scaled(least=2)
    manager.send_signal(signal.SIGHUP)
    region.replicas("ready", 2)
    region.write(replicas=1, target_inputs=2)
    manager.send_signal(signal.SIGHUP)
    region.replicas("ready", 1)
    assert not region.pool().scaled
    assert region.post("/v1/pools/m/scale?replicas=2") == 200
    region.replicas("ready", 2)


def test_an_engine_that_never_gets_ready_is_not_multiplied(region: Scaled) -> None:
    region.write_scaled(args=["--die-after-s", "0.05", "--ready-after-s", "60"])
    region.start()
    region.up()

    def tried() -> bool:
        region.report(queued=2, arrived=1)
        return region.log.count('"event":"replica_backoff"') >= 3

    until(tried, "three bad lives")
    fleet = region.fleet()
    assert fleet is not None
    assert len(fleet.replicas) <= region.pool().desired <= 3
