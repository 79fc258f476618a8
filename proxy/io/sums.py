"""The series of several workers as one: added up, or the largest where all tell the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from proxy.io.telemetry import Labels, Sample

# What each worker believes of the same thing, its own and the others' decisions in it: no sum.
LARGEST: Final = frozenset(
    (
        "event_loop_lag_seconds",
        "replica_queued_tokens",
        "remote_room",
        "replica_wait_seconds",
        "replica_decoding",
        "replica_prefill_tokens_per_second",
        "replica_cache_tokens",
        "queue_oldest_seconds",
    )
)


def sum_samples(samples: Iterable[Sample]) -> list[Sample]:
    """Add up the series of several workers; of some the largest counts, not the sum."""
    values: dict[tuple[str, Labels], float] = defaultdict(float)
    buckets: dict[tuple[str, Labels], list[int]] = {}
    for sample in samples:
        key = (sample.name, sample.labels)
        if sample.name in LARGEST:
            values[key] = max(values[key], sample.value)
            continue
        values[key] += sample.value
        if sample.buckets:
            total = buckets.setdefault(key, [0] * len(sample.buckets))
            for index, count in enumerate(sample.buckets):
                total[index] += count
    return [
        Sample(name, labels, value, tuple(buckets.get((name, labels), ())))
        for (name, labels), value in values.items()
    ]
