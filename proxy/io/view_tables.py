"""The tables of the view, each from what is counted and what is told: values in, values out.

What is not known is None, and what has not happened is 0 a second: a page that cannot tell these
apart shows an idle fleet as a broken one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from proxy import errors
from proxy.contract import NO_REGION, FleetSnapshot, ReplicaRecord
from proxy.contract.regions import RemoteState
from proxy.contract.view import (
    CODES_MAX,
    MODELS_MAX,
    ClassView,
    ModelView,
    Percentiles,
    RegionView,
    ReplicaView,
)
from proxy.core.classes import NAMES
from proxy.core.windows import NONE, Totals, Window, percentiles
from proxy.io.families import FAMILIES
from proxy.io.telemetry import Sample

ENGINE_PROMPT: Final = "engine_prompt_tokens"
ENGINE_CACHED: Final = "engine_cached_tokens"
# What rates and percentiles are of; other counters are not kept.
_COUNTED: Final = frozenset(
    (
        *("requests_total", "class_requests_total", "replica_requests_total"),
        *("routing_decisions_total", "prompt_tokens_total", "prefix_cached_tokens_total"),
        *("generation_tokens_total", "time_to_first_token_seconds"),
        *("time_per_output_token_seconds", "class_time_to_first_token_seconds"),
        *("class_time_per_output_token_seconds", "queue_wait_seconds", "queue_refused_total"),
    )
)
# Outcomes of a request that nobody began because there was no room or no time for it.
_REFUSED: Final = frozenset(
    one.code
    for one in errors.ALL_ERRORS
    if issubclass(
        one,
        errors.OverloadedError
        | errors.NoReplicaError
        | errors.QueueTimeoutError
        | errors.DeadlineExceededError,
    )
)

# Gauges with one label, or none; of a cache's source that which is not the usual one.
_SHOWN: Final = (
    *("client_connections", "requests_in_flight", "replica_inflight", "replica_queued_tokens"),
    *("replica_wait_seconds", "replica_decoding", "replica_prefill_tokens_per_second"),
    *("replica_cache_tokens", "replica_cache_source", "replica_cache_source_age_seconds"),
    *("queue_depth", "queue_bytes", "queue_oldest_seconds", "remote_inflight"),
)
_LARGEST: Final = frozenset(name for name in _SHOWN if FAMILIES[name].largest)
_BY_EVENTS: Final = ("source", "events")

Gauges = Mapping[str, Mapping[str, float]]


def totals_of(counters: Iterable[Sample], replicas: Iterable[ReplicaRecord], at_s: float) -> Totals:
    """Return the counters of all workers and engines as one moment.

    An engine's begin anew when it restarts, and so have the number of its life among their labels.
    """
    totals = Totals(at_s)
    for sample in counters:
        if sample.name in _COUNTED:
            totals.add(sample.name, sample.labels, sample.value, sample.buckets)
    for record in replicas:
        load = record.load
        if load is not None and load.prompt_tokens_total:
            by = (("replica", record.replica_id), ("life", str(record.restarts)))
            totals.add(ENGINE_PROMPT, by, load.prompt_tokens_total)
            totals.add(ENGINE_CACHED, by, load.cached_tokens_total)
    return totals


def gauges_of(samples: Iterable[Sample]) -> dict[str, dict[str, float]]:
    """Return the gauges that are shown, by name and then by their label: summed, or the largest.

    A fleet of hundreds has tens of thousands of them, so none is looked at more than once.
    """
    out: dict[str, dict[str, float]] = {name: {} for name in _SHOWN}
    for sample in samples:
        series = out.get(sample.name)
        if series is None:
            continue
        labels = sample.labels
        key = labels[0][1] if labels else ""
        if len(labels) > 1 and labels[1] != _BY_EVENTS:
            continue
        before = series.get(key)
        if before is None:
            series[key] = sample.value
        elif sample.name in _LARGEST:
            if sample.value > before:
                series[key] = sample.value
        else:
            series[key] = before + sample.value
    return out


# --- replicas ------------------------------------------------------------------------------------


def replica_views(
    fleet: FleetSnapshot | None,
    region: str,
    suspects: frozenset[str],
    gauges: Gauges,
    window: Window,
    ring_ratios: Mapping[str, float],
) -> tuple[ReplicaView, ...]:
    """Return all replicas, by pool and then by name; `region` is that of those that name none."""
    if fleet is None:
        return ()
    rates = window.rates("replica_requests_total", "replica")
    cached = ratios(window, ENGINE_CACHED, ENGINE_PROMPT, "replica")
    records = sorted(fleet.replicas, key=lambda record: (record.pool, record.replica_id))
    return tuple(
        [
            _replica_view(
                record,
                record.region if record.region != NO_REGION else region,
                suspect=record.replica_id in suspects,
                gauges=gauges,
                requests_per_s=rates.get(record.replica_id, 0.0),
                cached_ratio=cached.get(record.replica_id),
                ring_ratio=ring_ratios.get(record.replica_id, 0.0),
            )
            for record in records
        ]
    )


def _replica_view(
    record: ReplicaRecord,
    region: str,
    *,
    suspect: bool,
    gauges: Gauges,
    requests_per_s: float,
    cached_ratio: float | None,
    ring_ratio: float,
) -> ReplicaView:
    replica_id, load = record.replica_id, record.load

    def of(name: str) -> float:
        return gauges[name].get(replica_id, 0.0)

    return ReplicaView(
        replica_id=replica_id,
        pool=record.pool,
        region=region,
        engine=record.engine,
        engine_version=record.engine_version,
        models=record.models,
        state="asleep" if record.asleep else str(record.state),
        reason=record.reason,
        suspect=suspect,
        held=record.held,
        dp_size=record.dp_size,
        gpus=record.gpus,
        restarts=record.restarts,
        inflight=int(of("replica_inflight")),
        inflight_max=record.max_inputs,
        queued_tokens=int(of("replica_queued_tokens")),
        wait_s=round(of("replica_wait_seconds"), 4),
        decoding=round(of("replica_decoding"), 2),
        prefill_tokens_per_s=round(of("replica_prefill_tokens_per_second"), 1),
        requests_per_s=round(requests_per_s, 3),
        running=load.running if load else None,
        waiting=load.waiting if load else None,
        kv_used_ratio=round(load.kv_used_ratio, 4) if load else None,
        cached_ratio=cached_ratio,
        cache_tokens=int(of("replica_cache_tokens")),
        cache_source="events" if replica_id in gauges["replica_cache_source"] else "record",
        cache_source_age_s=_rounded(gauges["replica_cache_source_age_seconds"].get(replica_id)),
        ring_ratio=round(ring_ratio, 5),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# --- requests ------------------------------------------------------------------------------------


def ratios(window: Window, part: str, whole: str, label: str) -> dict[str, float]:
    """Return one counter's growth as a part of another's, by a label; none where that is none."""
    parts = window.by(part, label)
    return {
        key[0]: round(min(1.0, parts.get(key, 0.0) / total), 4)
        for key, total in window.by(whole, label).items()
        if total > 0.0
    }


def class_views(gauges: Gauges, window: Window) -> tuple[ClassView, ...]:
    """Return the classes, online first."""
    requests = window.rates("class_requests_total", "class")
    refused: dict[str, float] = {}
    for (work_class, outcome), grown in window.by(
        "class_requests_total", "class", "outcome"
    ).items():
        if outcome in _REFUSED and window.seconds:
            refused[work_class] = refused.get(work_class, 0.0) + grown / window.seconds
    first = histograms(window, "class_time_to_first_token_seconds", "class")
    token = histograms(window, "class_time_per_output_token_seconds", "class")
    wait = histograms(window, "queue_wait_seconds", "class")
    out = []
    for name in NAMES:
        depth = int(gauges["queue_depth"].get(name, 0.0))
        oldest_s = gauges["queue_oldest_seconds"].get(name, 0.0)
        out.append(
            ClassView(
                work_class=name,
                depth=depth,
                queue_bytes=int(gauges["queue_bytes"].get(name, 0.0)),
                oldest_s=round(oldest_s, 3) if depth else None,
                requests_per_s=round(requests.get(name, 0.0), 3),
                refused_per_s=round(refused.get(name, 0.0), 3),
                first_token=first.get(name, NONE),
                token=token.get(name, NONE),
                queue_wait=wait.get(name, NONE),
            )
        )
    return tuple(out)


def model_views(window: Window) -> tuple[ModelView, ...]:
    """Return the models that were asked for, the busiest first."""
    requests = window.rates("requests_total", "model")
    tokens = window.rates("generation_tokens_total", "model")
    cached = ratios(window, "prefix_cached_tokens_total", "prompt_tokens_total", "model")
    first = histograms(window, "time_to_first_token_seconds", "model")
    token = histograms(window, "time_per_output_token_seconds", "model")
    names = sorted(filter(None, requests), key=lambda name: (-requests[name], name))
    return tuple(
        [
            ModelView(
                model=name,
                requests_per_s=round(requests[name], 3),
                tokens_per_s=round(tokens.get(name, 0.0), 1),
                cached_ratio=cached.get(name),
                first_token=first.get(name, NONE),
                token=token.get(name, NONE),
            )
            for name in names[:MODELS_MAX]
        ]
    )


def histograms(window: Window, name: str, label: str) -> dict[str, Percentiles]:
    """Return the percentiles of a histogram by one label."""
    return {
        key: percentiles(FAMILIES[name].edges, counts)
        for key, counts in window.buckets_by(name, label).items()
    }


def code_rates(window: Window) -> dict[str, float]:
    """Return the answers a second by status, the most frequent first."""
    rates = window.rates("requests_total", "code")
    order = sorted(rates, key=lambda code: (-rates[code], code))[:CODES_MAX]
    return {code: round(rates[code], 3) for code in order}


def errors_per_s(window: Window) -> float:
    """Return what failed: answers of 500 and above, and streams that were cut."""
    failed = sum(
        grown
        for (code, outcome), grown in window.by("requests_total", "code", "outcome").items()
        if outcome == errors.STREAM_CUT or code >= "500"
    )
    return round(failed / window.seconds, 3) if window.seconds else 0.0


# --- other regions -------------------------------------------------------------------------------


def region_views(
    remotes: Iterable[RemoteState], gauges: Gauges, now_s: float
) -> tuple[RegionView, ...]:
    """Return the proxies of other regions, in the order of their names."""
    out = []
    for remote in sorted(remotes, key=lambda one: one.name):
        summary = remote.summary
        out.append(
            RegionView(
                region=remote.region,
                peer=remote.name,
                linked=remote.linked,
                draining=summary is not None and summary.draining,
                round_trip_s=_rounded(remote.round_trip_s) if remote.linked else None,
                summary_age_s=round(max(0.0, now_s - remote.at_s), 3) if summary else None,
                inflight=int(gauges["remote_inflight"].get(remote.name, 0.0)),
            )
        )
    return tuple(out)
