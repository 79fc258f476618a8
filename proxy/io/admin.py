"""The admin listener: health, metrics, replicas, dry runs. On its own port: load cannot silence it.

Counters are summed over workers; what a dead worker had counted stays in the sums, as it last said,
so that no counter ever falls.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from typing_extensions import override

from proxy.contract import FleetSnapshot
from proxy.core import limits
from proxy.io.telemetry import OVERHEAD_BUCKETS, SECONDS_BUCKETS, Labels, Sample
from proxy.version import package_version

PREFIX = "doherty_"

# What each worker believes of the same thing, its own and the others' decisions in it: no sum.
_LARGEST = frozenset(
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

_HELP = {
    "requests": "Requests ended, by route, model, status and outcome",
    "request_duration_seconds": "From the head of a request to the end of its answer",
    "time_to_first_token_seconds": "From the head of a request to the first that was generated",
    "overhead_seconds": "From the whole request to its departure to a replica",
    "prompt_tokens": "Prompt tokens, of answers that reported usage",
    "prefix_cached_tokens": "Prompt tokens found in a prefix cache, of answers that reported usage",
    "tenant_requests": "Requests of a tenant that a replica has had",
    "tenant_prompt_tokens": "Prompt tokens of a tenant, cached ones among them",
    "tenant_cached_tokens": "Prompt tokens of a tenant that were cached",
    "tenant_completion_tokens": "Generated tokens of a tenant",
    "tenant_cost": "What a tenant's tokens cost, in the currency of the models' prices",
    "tenant_rate_limited": "Requests of a tenant that were refused, by the limit",
    "tenant_minute_requests": "Requests of a limited tenant in the last minute",
    "tenant_minute_tokens": "Tokens of a limited tenant in the last minute, or reserved",
    "tenant_concurrent": "Requests of a limited tenant that run",
    "tenant_day_tokens": "Tokens of a limited tenant since midnight UTC",
    "tenant_day_cost": "What these have cost",
    "usage_log_dropped": "Lines that the usage log had no room for",
    "generation_tokens": "Generated tokens, of answers that reported usage",
    "routing_decisions": "Choices of a replica, by reason",
    "retries": "Further attempts, by what failed",
    "cancellations": "Requests whose client went away, by how far they were",
    "replica_requests": "Requests ended, by replica",
    "replica_inflight": "Requests in flight on a replica",
    "replica_queued_tokens": "Prefill tokens sent to a replica whose answer has not begun",
    "replica_wait_seconds": "Work that waits on a replica, as the proxy believes",
    "replica_decoding": "Requests past their prefill on a replica, by weight",
    "replica_prefill_tokens_per_second": "Prefill speed that a replica has shown",
    "replica_cache_tokens": "KV cache that a replica is believed to have",
    "replica_cache_source": "1 for what a replica's cache is judged by: events, or the record",
    "replica_cache_source_age_seconds": "Since the KV events of a replica were last heard",
    "replica_suspect": "Workers that hold the replica for gone",
    "remote_inflight": "Requests in flight at a proxy of another region",
    "remote_room": "Further requests that a proxy of another region would begin now, by model",
    "replica_state": "1 for the state that the fleet gives a replica",
    "connections_accepted": "Client connections accepted",
    "client_connections": "Open client connections",
    "requests_in_flight": "Requests under way",
    "upstream_connections": "Connections to replicas",
    "prefix_index_entries": "Entries in the index of which replica holds which prefixes",
    "connections_refused": "Client connections closed at once because there were too many",
    "tls_handshakes_failed": "TLS handshakes with clients that failed, by reason",
    "answers_without_usage": "Answers of 200 that reported no token counts",
    "engine_aborts": "Requests that an engine was told to end, for want of a client",
    "keepalive_comments": "Comments sent to streams whose requests wait",
    "request_bodies_bytes": "Request bodies held until their replica begins to answer",
    "queue_depth": "Requests that wait for a replica, by class",
    "queue_bytes": "Bodies of the requests that wait for a replica, by class",
    "queue_oldest_seconds": "The longest wait of those that wait for a replica now, by class",
    "queue_held_for_start": "Requests that wait for a model of which nothing is awake",
    "deadline_met": "Requests whose first octet came by their deadline, by class",
    "deadline_missed": "Requests whose first octet came after their deadline, or never, by class",
    "deadline_shed": "Requests told that their deadline could not be met any more, by class",
    "queue_refused": "Requests that found no room to wait, or made room for others, by class",
    "preempted": "Offline requests that were ended unanswered for online work, by outcome",
    "preemption_asked": "Offline requests of other workers that were asked to give way",
    "preemption_late": "Of those, answered or over before they could",
    "queue_wait_seconds": "How long requests waited for a replica, of those that had to, by class",
    "queue_waits": "Requests that had to wait for a replica, by class and what for",
    "class_requests": "Requests, by class and outcome",
    "class_time_to_first_token_seconds": "From a request's head to its first token, by class",
    "slo_requests": "Requests that wanted a time kept, by class and which",
    "demand_reports": "Reports to the manager of what is in flight and waits, by outcome",
    "leases_of_others": "Leases that workers know of from other workers and proxies",
    "notes_sent": "Decisions told to other workers and proxies",
    "notes_heard": "Decisions that others have told; each worker counts its own hearing",
    "notes_lost": "Decisions that were not told or could not be used, by reason",
    "note_lag_seconds": "From a decision to its hearing by another worker",
    "note_batches": "Batches of decisions that the supervisor passed on, by where they came from",
    "note_batches_dropped": "Batches that somebody did not hear because he was behind",
    "peers": "Other proxies that this one is linked with",
    "wanted_here_inputs": "Requests in flight that another region asks replicas for, of this one",
    "wanted_elsewhere_inputs": "Requests in flight that another region is asked replicas for",
    "remote_linked": "Whether a proxy of another region is linked, and its summary young",
    "remote_round_trip_seconds": "Least of the last round trips to a proxy of another region",
    "remote_summary_age_seconds": "Age of the last summary of a proxy of another region",
    "remote_draining": "Whether a proxy of another region says that it drains",
    "hops_refused": "Requests that claimed to come from another region and were not taken",
    "hops_arrived": "Requests that other regions have sent here",
    "hops_sent": "Requests that went to a proxy of another region, by what became of them",
    "hops_waiting": "Requests that have crossed and wait for their first octet",
    "peer_failures": "Links and attempts at links with other proxies that failed, by reason",
    "leases": "Leases held on replicas; as many as requests that one of them has",
    "access_log_dropped": "Access log lines that found no room",
    "event_loop_lag_seconds": "Longest lateness of the workers' timers since the last reading",
    "unsolicited_answers": "Connections closed because a replica sent octets nobody asked for",
    "internal_errors": "Faults of the proxy itself",
    "worker_restarts": "Workers started again",
    "workers": "Worker processes that serve",
    "fleet_age_seconds": "Since the fleet was last heard of",
    "jwt_keys_age_seconds": "Since the identity provider's keys were last seen",
    "jwt_keys_failures": "Times that the identity provider's keys could not be had",
    "keys": "API keys that are known, those that are over among them",
    "keys_version": "Version of the set of API keys",
    "keys_age_seconds": "Since the set of API keys was last seen to be the newest",
    "keys_failures": "Times that the set of API keys could not be read, or its source was lost",
    "build_info": "Version of the proxy",
    "trace_spans_exported": "Spans of traces that the collector has taken",
    "trace_spans_dropped": "Spans of traces that were not, by reason",
}


class Status(Protocol):
    """What the admin pages show; the supervisor has it."""

    def ready(self) -> str | None:
        """Return None when ready, else the reason why not."""

    def fleet(self) -> FleetSnapshot | None: ...

    def suspects(self) -> frozenset[str]: ...

    async def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of all workers, unsummed."""

    async def explain(
        self, path: bytes, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes] | None:
        """Return the status and JSON of a dry run, or None when no worker says it in time."""


class _Families(Collector):
    def __init__(self, counters: Iterable[Sample], gauges: Iterable[Sample]) -> None:
        self._counters = sum_samples(counters)
        self._gauges = sum_samples(gauges)

    @override
    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for sample in self._counters:
            add_sample(families, sample, counter=True)
        for sample in self._gauges:
            add_sample(families, sample, counter=False)
        yield from families.values()


def sum_samples(samples: Iterable[Sample]) -> list[Sample]:
    """Add up the series of several workers; of some the largest counts, not the sum."""
    values: dict[tuple[str, Labels], float] = defaultdict(float)
    buckets: dict[tuple[str, Labels], list[int]] = {}
    for sample in samples:
        key = (sample.name, sample.labels)
        if sample.name in _LARGEST:
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


def add_sample(families: dict[str, Metric], sample: Sample, *, counter: bool) -> None:
    """Add one series to its family, made when first met."""
    bare = sample.name.removesuffix("_total")
    names = [name for name, _ in sample.labels]
    family = families.get(bare)
    if family is None:
        kind: Callable[..., Metric]
        if sample.buckets:
            kind = HistogramMetricFamily
        elif counter and sample.name.endswith("_total"):
            kind = CounterMetricFamily
        else:
            kind = GaugeMetricFamily
        family = kind(PREFIX + bare, _HELP[bare], labels=names)
        families[bare] = family
    values = [value for _, value in sample.labels]
    if isinstance(family, HistogramMetricFamily):
        edges = OVERHEAD_BUCKETS if bare == "overhead_seconds" else SECONDS_BUCKETS
        running = 0
        cumulative: list[tuple[str, float]] = []
        for edge, count in zip((*map(str, edges), "+Inf"), sample.buckets, strict=True):
            running += count
            cumulative.append((edge, running))
        family.add_metric(values, buckets=cumulative, sum_value=sample.value)
    elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
        family.add_metric(values, sample.value)


def render_metrics(counters: Iterable[Sample], gauges: Iterable[Sample]) -> bytes:
    """Return the exposition text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(counters, gauges))
    return generate_latest(registry)


def fleet_samples(fleet: FleetSnapshot | None) -> list[Sample]:
    out = [Sample("build_info", (("version", package_version()),), 1)]
    for record in fleet.replicas if fleet else ():
        labels = (("replica", record.replica_id), ("state", str(record.state)))
        out.append(Sample("replica_state", labels, 1))
    return out


class _Pages:
    """The request handlers of the admin listener."""

    def __init__(self, status: Status, api_key: str | None) -> None:
        self._status = status
        self._digest = hashlib.sha256(api_key.encode()).digest() if api_key else b""

    @web.middleware
    async def guard(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        if self._digest and request.path not in _OPEN_PATHS:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
            if not hmac.compare_digest(digest, self._digest):
                return _error(401, "invalid_api_key", "send the admin key as a bearer token")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, "admin", error.reason)

    async def live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(self, _: web.Request) -> web.Response:
        reason = self._status.ready()
        if reason is None:
            return web.json_response({"status": "ready"})
        return _error(503, "not_ready", reason)

    async def metrics(self, _: web.Request) -> web.Response:
        counters, gauges = await self._status.samples()
        text = render_metrics(counters, [*gauges, *fleet_samples(self._status.fleet())])
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def replicas(self, _: web.Request) -> web.Response:
        _counters, gauges = await self._status.samples()
        page = replicas_page(self._status.fleet(), self._status.suspects(), gauges)
        return web.Response(body=page, content_type="application/json")

    async def route(self, request: web.Request) -> web.Response:
        """Say what would be done with the request in the body, and why."""
        path = request.query.get("path", "/v1/chat/completions").encode("utf-8", "surrogateescape")
        fields = [(name.lower(), value) for name, value in request.raw_headers]
        told = [field for field in fields if field[0] not in _ADMINS_OWN]
        explained = await self._status.explain(path, told, await request.read())
        if explained is None:
            return _error(503, "not_explained", "no worker could say it in time")
        status, body = explained
        return web.Response(status=status, body=body, content_type="application/json")


def make_app(status: Status, api_key: str | None) -> web.Application:
    """Return the admin application. Health is open; the rest wants the key if there is one."""
    pages = _Pages(status, api_key)
    app = web.Application(middlewares=[pages.guard], client_max_size=limits.EXPLAINED_BYTES_MAX)
    for path in _LIVE_PATHS:
        app.router.add_get(path, pages.live)
    for path in _READY_PATHS:
        app.router.add_get(path, pages.ready)
    app.router.add_get("/metrics", pages.metrics)
    app.router.add_get("/replicas", pages.replicas)
    app.router.add_post("/debug/route", pages.route)
    return app


# What load balancers and orchestrators ask for, under all the names that they have for it.
_LIVE_PATHS = ("/livez", "/live", "/liveness", "/health", "/healthz")
_READY_PATHS = ("/readyz", "/ready", "/readiness")
# Fields of a request to be explained that are about the admin's own request.
_ADMINS_OWN = frozenset(
    (
        *(b"authorization", b"connection", b"content-encoding", b"content-length", b"expect"),
        *(b"host", b"transfer-encoding"),
    )
)
_OPEN_PATHS = frozenset(_LIVE_PATHS + _READY_PATHS)


def replicas_page(
    fleet: FleetSnapshot | None, suspects: frozenset[str], gauges: Iterable[Sample]
) -> bytes:
    """Return the replicas with what the manager and what the workers know of them."""
    summed = {(s.name, s.labels): s.value for s in sum_samples(gauges)}
    page = []
    for record in fleet.replicas if fleet else ():
        by = (("replica", record.replica_id),)
        by_events = (*by, ("source", "events"))
        load = record.load
        page.append(
            {
                "replica_id": record.replica_id,
                "url": record.url,
                "models": record.models,
                "pool": record.pool,
                "region": record.region,
                "engine": record.engine,
                "dp_size": record.dp_size,
                "adapters": record.adapters,
                "asleep": record.asleep,
                "state": str(record.state),
                "reason": record.reason,
                "suspect": record.replica_id in suspects,
                "inflight": int(summed.get(("replica_inflight", by), 0)),
                "queued_tokens": int(summed.get(("replica_queued_tokens", by), 0)),
                "wait_s": round(summed.get(("replica_wait_seconds", by), 0.0), 6),
                "decoding": round(summed.get(("replica_decoding", by), 0.0), 3),
                "prefill_tokens_per_second": round(
                    summed.get(("replica_prefill_tokens_per_second", by), 0.0), 1
                ),
                "cache_tokens": int(summed.get(("replica_cache_tokens", by), 0)),
                "cache_source": "events"
                if ("replica_cache_source", by_events) in summed
                else "record",
                "cache_source_age_s": summed.get(("replica_cache_source_age_seconds", by)),
                "running": load.running if load else None,
                "waiting": load.waiting if load else None,
                "kv_used_ratio": load.kv_used_ratio if load else None,
            }
        )
    return orjson.dumps({"replicas": page}, option=orjson.OPT_INDENT_2)


def _error(status: int, code: str, message: str) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return web.json_response({"error": error}, status=status)
