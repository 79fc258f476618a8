"""What a view of a large fleet costs: 500 replicas, eight workers. `-s` shows the figures."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, field

from proxy.contract import FleetSnapshot, LoadSample, ReplicaRecord
from proxy.contract.regions import RemoteState
from proxy.contract.view import ARCS_MAX, ProxyView, decode_view
from proxy.core.policy import REASONS
from proxy.io.class_telemetry import ClassTelemetry
from proxy.io.control import HotPrefix
from proxy.io.scaling_news import ScalingNews
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample, Telemetry
from proxy.io.viewing import Viewing

REPLICAS, WORKERS = 500, 8
GAUGES = (
    "replica_inflight", "replica_queued_tokens", "replica_wait_seconds", "replica_decoding",
    "replica_prefill_tokens_per_second", "replica_cache_tokens", "replica_suspect",
)  # fmt: skip


def _nobody() -> None:
    return None


def _no_session() -> None:
    raise AssertionError("there is no manager to ask")


@dataclass
class LargeFleet:
    """A source as the supervisor has it, after some time of work."""

    snapshot: FleetSnapshot
    worked: int = 0
    draw: random.Random = field(default_factory=lambda: random.Random(1))

    def proxy(self) -> ProxyView:
        return ProxyView(version="1", policy="prefix", region="eu", workers=WORKERS)

    def fleet(self) -> FleetSnapshot:
        return self.snapshot

    def suspects(self) -> frozenset[str]:
        return frozenset()

    def remotes(self) -> list[RemoteState]:
        return []

    def take_lag_s(self) -> float:
        return 0.001

    def hot(self) -> list[HotPrefix]:
        ids = [record.replica_id for record in self.snapshot.replicas]
        return [
            HotPrefix(self.draw.getrandbits(64), 4000, 90 - n, 500, 500, ids[n : n + 16])
            for n in range(64)
        ]

    async def recount(self) -> None:
        self.worked += 100

    def counted(self) -> tuple[list[Sample], list[Sample]]:
        counters: list[Sample] = []
        gauges: list[Sample] = []
        for _ in range(WORKERS):
            telemetry = Telemetry()
            for record in self.snapshot.replicas:
                telemetry.replica_requests[record.replica_id] = self.worked
                by = (("replica", record.replica_id),)
                gauges += [Sample(name, by, self.draw.random() * 1e4) for name in GAUGES]
            for reason in REASONS:
                telemetry.decisions[reason] = self.worked
            for number in range(40):
                series = telemetry.series("chat", f"model-{number}")
                series.outcomes[200, "ok"] = self.worked
                series.first_token_s.observe(0.3)
            counters += [*telemetry.samples(), *ClassTelemetry().samples()]
        return counters, gauges


def a_large_fleet() -> FleetSnapshot:
    draw = random.Random(0)
    return FleetSnapshot(
        epoch="e",
        version=1,
        replicas=tuple(
            ReplicaRecord(
                replica_id=f"qwen3-32b-{number:03d}",
                url=f"http://10.0.{number // 250}.{number % 250}:30000",
                models=(f"model-{number % 8}", f"adapter-{number % 8}"),
                pool=f"qwen3-32b-{number % 8}",
                engine="sglang",
                engine_version="0.5.23",
                gpus=("4", "5", "6", "7"),
                reason="warming up" if number % 9 == 0 else "",
                load=LoadSample(
                    at_s=1.0,
                    running=draw.randrange(64),
                    waiting=draw.randrange(9),
                    kv_used_ratio=draw.random(),
                    prompt_tokens_total=draw.randrange(10**9),
                    cached_tokens_total=draw.randrange(10**8),
                ),
            )
            for number in range(REPLICAS)
        ),
    )


async def test_a_view_of_500_replicas_stays_small() -> None:
    source = LargeFleet(a_large_fleet())
    viewing = Viewing(
        source, ScalingNews(_no_session, _nobody), Tasks(), now_s=iter(range(1000)).__next__
    )
    await viewing.newest()
    counters, gauges = source.counted()
    source.counted = lambda: (counters, gauges)  # type: ignore[method-assign]  # not to be timed
    taken_s = []
    for _ in range(5):
        before_s = time.process_time()
        viewing.hurry()
        totals, summed = viewing._sums(float(viewing.number))
        middle_s = time.process_time()
        viewing._make(totals, summed, float(viewing.number))
        taken_s.append((time.process_time() - middle_s, middle_s - before_s))
    made_s, summed_s = min(taken_s)
    sys.stdout.write(
        f"{REPLICAS} replicas, {WORKERS} workers: {len(viewing.body)} bytes, "
        f"{1e3 * summed_s:.1f} ms to sum, {1e3 * made_s:.1f} ms to make\n"
    )
    view = decode_view(viewing.body)
    assert len(view.replicas) == REPLICAS
    assert len(view.rings) == 8
    assert sum(len(ring.arcs) for ring in view.rings) <= ARCS_MAX
    assert sum(len(ring.prefixes) for ring in view.rings) == 64
    assert len(viewing.body) < 400_000
