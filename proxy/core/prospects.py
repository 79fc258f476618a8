"""What is to be expected of a model's replicas, as the manager that scales them says.

A model may be served by several pools, and a pool by several names (an adapter's is one): what the
pools promise is put together by model name, once for each snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from proxy.contract import PoolRecord
from proxy.core import claim_limits
from proxy.core.classes import ONLINE, class_named


@dataclass(frozen=True)
class Prospect:
    """What demand for one model will bring up, and when."""

    name: str  # under which the manager counts demand for it
    work_class: int = ONLINE  # of requests that say nothing
    wakes: bool = False  # demand brings replicas up
    awake: int = 0
    coming: int = 0
    ready_in_s: float = 0.0  # when the next of these should serve; 0: none comes, or nobody knows
    start_s: float = 0.0  # what a start takes; 0: not known
    startable: int = 0  # further replicas that could be started now
    carries: float = 0.0  # requests in flight that a replica is meant to have; 0: not known

    @property
    def starts_in_s(self) -> float:
        """When one that comes up for a request of this moment should serve it; infinite: never."""
        if self.coming and self.ready_in_s > 0.0:
            return self.ready_in_s
        if self.coming or self.wakes:
            return self.start_s or claim_limits.UNKNOWN_START_S
        return float("inf")


UNSCALED: Final = Prospect("")


def prospects_of(
    records: Iterable[PoolRecord], pools_of: Mapping[str, frozenset[str]]
) -> dict[str, Prospect]:
    """Return the prospect of each model name that a scaled pool serves.

    `pools_of` names the pools in which replicas answer to each name today: a pool that is at zero
    says only its model, and the other names are known while it has replicas.
    """
    records = tuple(records)
    found: dict[str, Prospect] = {}
    for model in sorted({record.model for record in records} | pools_of.keys()):
        pools = pools_of.get(model, frozenset())
        theirs = {record.pool: record for record in records if record.pool in pools}
        theirs |= {record.pool: record for record in records if record.model == model}
        for record in theirs.values():  # a pool may be told of by each of its names
            one = _prospect(record)
            before = found.get(model)
            found[model] = one if before is None else _together(before, one)
    return found


def _prospect(record: PoolRecord) -> Prospect:
    return Prospect(
        record.model,
        class_named(record.work_class),
        record.wakes,
        record.awake,
        record.coming,
        max(0.0, record.ready_in_s),
        max(0.0, record.start_s),
        max(0, record.startable),
        max(0.0, record.carries),
    )


def _together(one: Prospect, other: Prospect) -> Prospect:
    return replace(
        one,
        work_class=min(one.work_class, other.work_class),
        wakes=one.wakes or other.wakes,
        awake=one.awake + other.awake,
        coming=one.coming + other.coming,
        ready_in_s=_sooner_s(one.ready_in_s, other.ready_in_s),
        start_s=_sooner_s(one.start_s, other.start_s),
        startable=one.startable + other.startable,
        carries=max(one.carries, other.carries),
    )


def _sooner_s(one: float, other: float) -> float:
    """Return the lesser of two times of which 0 means that it is not known."""
    return min(one, other) if one > 0.0 and other > 0.0 else max(one, other)
