"""The manager's figures for Prometheus, read off the keepers when they are asked for.

So there is nothing to keep in step. Of scaling: `scaling_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from backends import scaling_metrics
from backends.autoscale import Autoscaler
from backends.exposition import Declared
from backends.feed import Feed
from backends.keeper import Keeper
from backends.metric_lists import MANAGER, MANAGER_PREFIX
from proxy.contract import ReplicaState


class Source(Protocol):
    """What is told of."""

    @property
    def keepers(self) -> Mapping[str, Keeper]: ...

    @property
    def feed(self) -> Feed: ...

    @property
    def scaler(self) -> Autoscaler: ...


def collect(source: Source, watchers: int) -> Iterator[scaling_metrics.Metric]:
    """Yield all families; so many proxies watch the fleet."""
    declared = Declared(MANAGER_PREFIX, MANAGER)
    states = dict.fromkeys([*(state.value for state in ReplicaState), "asleep"], 0)
    of_workers = dict(states)
    replicas, workers = declared.gauge("replicas"), declared.gauge("engine_workers")
    restarts = declared.counter("restarts_total")
    failures = declared.counter("scrape_failures_total")
    for replica_id, keeper in source.keepers.items():
        record = keeper.record()
        counted = of_workers if keeper.questions.gives_back else states
        counted["asleep" if record.asleep else record.state.value] += 1
        restarts.add_metric([replica_id], record.restarts)
        failures.add_metric([replica_id], keeper.questions.failures)
    for state, count in states.items():
        replicas.add_metric([state], count)
        workers.add_metric([state], of_workers[state])
    yield from (replicas, workers, restarts, failures)
    yield declared.gauge("fleet_version", source.feed.snapshot.version)
    yield declared.gauge("watchers", watchers)
    yield from scaling_metrics.collect(declared, source.scaler.report())
    yield from source.scaler.tally.collect(declared)
    yield declared.build()
