"""Every metric of the proxy, once: its type, its labels, what it tells, how workers' are added up.

What several workers believe of the same thing, with each other's decisions in it, is no sum: of
those the largest counts (`largest`).
"""

from __future__ import annotations

from typing import Final

from proxy.contract.metrics import counter, gauge, histogram, table
from proxy.io.telemetry import OVERHEAD_BUCKETS, SECONDS_BUCKETS, TOKEN_BUCKETS

_REQUESTS: Final = (
    counter(
        "requests_total",
        "route model code outcome",
        "Requests ended, by route, model, status and outcome",
    ),
    histogram(
        "request_duration_seconds",
        "route model",
        "From the head of a request to the end of its answer",
        SECONDS_BUCKETS,
    ),
    histogram(
        "time_to_first_token_seconds",
        "route model",
        "From the head of a request to the first that was generated",
        SECONDS_BUCKETS,
    ),
    histogram(
        "time_per_output_token_seconds",
        "route model",
        "Mean time between the tokens of one streamed answer, of those that reported usage",
        TOKEN_BUCKETS,
    ),
    histogram(
        "overhead_seconds",
        "",
        "From the whole request to its departure to a replica, its wait for one left out",
        OVERHEAD_BUCKETS,
    ),
    counter("prompt_tokens_total", "route model", "Prompt tokens, of answers that reported usage"),
    counter(
        "prefix_cached_tokens_total",
        "route model",
        "Prompt tokens found in a prefix cache, of answers that reported usage",
    ),
    counter(
        "generation_tokens_total", "route model", "Generated tokens, of answers that reported usage"
    ),
    counter("routing_decisions_total", "reason", "Choices of a replica, by reason"),
    counter("retries_total", "reason", "Further attempts, by what failed"),
    counter(
        "cancellations_total", "state", "Requests whose client went away, by how far they were"
    ),
    gauge("requests_in_flight", "", "Requests under way"),
    counter("answers_without_usage_total", "", "Answers of 200 that reported no token counts"),
    counter(
        "engine_aborts_total",
        "outcome",
        "Requests that an engine was told to end, for want of a client, by outcome",
    ),
    counter("keepalive_comments_total", "", "Comments sent to streams whose requests wait"),
    gauge("request_bodies_bytes", "", "Request bodies held until their replica begins to answer"),
    counter("internal_errors_total", "", "Faults of the proxy itself"),
)

_CLASSES: Final = (
    counter("class_requests_total", "class outcome", "Requests, by class and outcome"),
    histogram(
        "class_time_to_first_token_seconds",
        "class",
        "From a request's head to its first token, by class",
        SECONDS_BUCKETS,
    ),
    histogram(
        "class_time_per_output_token_seconds",
        "class",
        "Mean time between the tokens of one streamed answer, by class",
        TOKEN_BUCKETS,
    ),
    gauge("queue_depth", "class", "Requests that wait for a replica, by class"),
    gauge("queue_bytes", "class", "Bodies of the requests that wait, by class"),
    gauge("queue_depth_max", "class", "Requests of a class that may wait"),
    gauge(
        "queue_oldest_seconds",
        "class",
        "The longest wait of those that wait for a replica now, by class",
        largest=True,
    ),
    gauge("queue_held_for_start", "", "Requests that wait for a model of which nothing is awake"),
    histogram(
        "queue_wait_seconds",
        "class",
        "How long requests waited for a replica, of those that had to, by class",
        SECONDS_BUCKETS,
    ),
    counter(
        "queue_waits_total",
        "class reason",
        "Requests that had to wait for a replica, by class and what for",
    ),
    counter(
        "queue_refused_total",
        "class",
        "Requests that found no room to wait, or made room for others, by class",
    ),
    counter(
        "deadline_met_total", "class", "Requests whose first octet came by their deadline, by class"
    ),
    counter(
        "deadline_missed_total",
        "class",
        "Requests whose first octet came after their deadline, or never, by class",
    ),
    counter(
        "deadline_shed_total",
        "class",
        "Requests told that their deadline could not be met any more, by class",
    ),
    counter(
        "slo_requests_total", "class wish", "Requests that wanted a time kept, by class and which"
    ),
    counter(
        "preempted_total",
        "outcome",
        "Offline requests that were ended unanswered for online work, by outcome",
    ),
    counter(
        "preemption_asked_total",
        "",
        "Offline requests of other workers that were asked to give way",
    ),
    counter("preemption_late_total", "", "Of those, answered or over before they could"),
)

_REPLICAS: Final = (
    counter("replica_requests_total", "replica", "Requests ended, by replica"),
    gauge("replica_inflight", "replica", "Requests in flight on a replica"),
    gauge(
        "replica_queued_tokens",
        "replica",
        "Prefill tokens sent to a replica whose answer has not begun",
        largest=True,
    ),
    gauge(
        "replica_wait_seconds",
        "replica",
        "Work that waits on a replica, as the proxy believes",
        largest=True,
    ),
    gauge(
        "replica_decoding",
        "replica",
        "Requests past their prefill on a replica, by weight",
        largest=True,
    ),
    gauge(
        "replica_prefill_tokens_per_second",
        "replica",
        "Prefill speed that a replica has shown",
        largest=True,
    ),
    gauge(
        "replica_cache_tokens",
        "replica",
        "KV cache that a replica is believed to have",
        largest=True,
    ),
    gauge(
        "replica_cache_source",
        "replica source",
        "1 for what a replica's cache is judged by: events, or the record",
    ),
    gauge(
        "replica_cache_source_age_seconds",
        "replica",
        "Since the KV events of a replica were last heard",
    ),
    gauge(
        "replica_suspect",
        "replica",
        "Workers that hold the replica for gone: the breaker, open where above 0",
    ),
    counter("suspicions_total", "", "Times that a replica was held for gone, and was probed"),
    gauge("replica_state", "replica state", "1 for the state that the fleet gives a replica"),
    gauge("replica_kv_usage_ratio", "replica", "KV cache in use, as the engine says"),
    gauge("replica_running", "replica", "Requests that the engine computes, as it says"),
    gauge("replica_waiting", "replica", "Requests queued in the engine, as it says"),
    gauge("replica_info_age_seconds", "replica", "Age of what the engine has said of itself"),
    gauge("upstream_connections", "state", "Connections to replicas, idle and busy"),
    counter(
        "unsolicited_answers_total",
        "",
        "Connections closed because a replica sent octets nobody asked for",
    ),
    gauge("leases", "", "Leases held on replicas; as many as requests that one of them has"),
    gauge("prefix_index_entries", "", "Entries in the index of which replica holds which prefixes"),
)

_TENANTS: Final = (
    counter("tenant_requests_total", "tenant model", "Requests of a tenant that a replica has had"),
    counter(
        "tenant_prompt_tokens_total",
        "tenant model",
        "Prompt tokens of a tenant, cached ones among them",
    ),
    counter(
        "tenant_cached_tokens_total", "tenant model", "Prompt tokens of a tenant that were cached"
    ),
    counter("tenant_completion_tokens_total", "tenant model", "Generated tokens of a tenant"),
    counter(
        "tenant_cost_total",
        "tenant model",
        "What a tenant's tokens cost, in the currency of the models' prices",
    ),
    counter(
        "tenant_rate_limited_total",
        "tenant limit",
        "Requests of a tenant that were refused, by the limit",
    ),
    gauge("tenant_minute_requests", "tenant", "Requests of a limited tenant in the last minute"),
    gauge(
        "tenant_minute_tokens",
        "tenant",
        "Tokens of a limited tenant in the last minute, or reserved",
    ),
    gauge("tenant_concurrent", "tenant", "Requests of a limited tenant that run"),
    gauge("tenant_day_tokens", "tenant", "Tokens of a limited tenant since midnight UTC"),
    gauge("tenant_day_cost", "tenant", "What these have cost"),
    gauge("keys", "", "API keys that are known, those that are over among them"),
    gauge("keys_version", "", "Version of the set of API keys"),
    gauge("keys_age_seconds", "", "Since the set of API keys was last seen to be the newest"),
    counter(
        "keys_failures_total",
        "",
        "Times that the set of API keys could not be read, or its source was lost",
    ),
    gauge("jwt_keys_age_seconds", "", "Since the identity provider's keys were last seen"),
    counter(
        "jwt_keys_failures_total", "", "Times that the identity provider's keys could not be had"
    ),
    counter("usage_log_dropped_total", "", "Lines that the usage log had no room for"),
)

_REGIONS: Final = (
    gauge("remote_inflight", "remote", "Requests in flight at a proxy of another region"),
    gauge(
        "remote_room",
        "remote model",
        "Further requests that a proxy of another region would begin now, by model",
        largest=True,
    ),
    gauge(
        "remote_linked",
        "remote region",
        "Whether a proxy of another region is linked, and its summary young",
    ),
    gauge(
        "remote_round_trip_seconds",
        "remote region",
        "Least of the last round trips to a proxy of another region",
    ),
    gauge(
        "remote_summary_age_seconds",
        "remote region",
        "Age of the last summary of a proxy of another region",
    ),
    gauge(
        "remote_draining", "remote region", "Whether a proxy of another region says that it drains"
    ),
    counter(
        "hops_refused_total",
        "reason",
        "Requests that claimed to come from another region and were not taken",
    ),
    counter("hops_arrived_total", "region", "Requests that other regions have sent here"),
    counter(
        "hops_sent_total",
        "remote outcome",
        "Requests that went to a proxy of another region, by what became of them",
    ),
    gauge("hops_waiting", "direction", "Requests that have crossed and wait for their first octet"),
    gauge(
        "wanted_here_inputs",
        "model region",
        "Requests in flight that another region asks replicas for, of this one",
    ),
    gauge(
        "wanted_elsewhere_inputs",
        "model region",
        "Requests in flight that another region is asked replicas for",
    ),
)

_NOTES: Final = (
    gauge("leases_of_others", "", "Leases that workers know of from other workers and proxies"),
    counter("notes_sent_total", "", "Decisions told to other workers and proxies"),
    counter(
        "notes_heard_total",
        "",
        "Decisions that others have told; each worker counts its own hearing",
    ),
    counter(
        "notes_lost_total", "reason", "Decisions that were not told or could not be used, by reason"
    ),
    histogram(
        "note_lag_seconds",
        "",
        "From a decision to its reading by another worker: before each choice, or twice a second",
        SECONDS_BUCKETS,
    ),
    counter(
        "note_batches_total",
        "from",
        "Batches of decisions that crossed to or from peers, by where they came from",
    ),
    counter(
        "note_batches_dropped_total", "", "Batches that somebody did not get because he was behind"
    ),
    gauge("peers", "", "Other proxies that this one is linked with"),
    counter(
        "peer_failures_total",
        "reason",
        "Links and attempts at links with other proxies that failed, by reason",
    ),
    counter(
        "demand_reports_total",
        "outcome",
        "Reports to the manager of what is in flight and waits, by outcome",
    ),
)

_PROXY: Final = (
    gauge("ready", "", "1 where /readyz says ready"),
    counter("connections_accepted_total", "", "Client connections accepted"),
    counter(
        "connections_refused_total",
        "",
        "Client connections closed at once because there were too many",
    ),
    gauge("client_connections", "", "Open client connections"),
    counter(
        "tls_handshakes_failed_total",
        "reason",
        "TLS handshakes with clients that failed, by reason",
    ),
    gauge(
        "tls_certificate_not_after_timestamp_seconds",
        "setting",
        "When a certificate that the proxy shows ends, by the setting that names it",
    ),
    counter("access_log_dropped_total", "", "Access log lines that found no room"),
    gauge(
        "event_loop_lag_seconds",
        "",
        "Longest lateness of the workers' timers since the last reading",
        largest=True,
    ),
    histogram(
        "event_loop_delay_seconds",
        "",
        "Lateness of the timer by which every worker sweeps, twice a second",
        SECONDS_BUCKETS,
    ),
    gauge("workers", "", "Worker processes that serve"),
    counter("worker_restarts_total", "", "Workers started again"),
    counter(
        "worker_cpu_seconds_total",
        "worker",
        "Processor time of a worker process; begins anew with each process",
    ),
    gauge("worker_resident_memory_bytes", "worker", "Memory of a worker process"),
    gauge("worker_open_fds", "worker", "Descriptors that a worker has open"),
    gauge("worker_max_fds", "worker", "Descriptors that a worker may have open"),
    gauge("fleet_age_seconds", "", "Since the fleet last changed"),
    gauge(
        "manager_silence_seconds",
        "",
        "Since the manager was last heard of, its heartbeats among that",
    ),
    counter(
        "config_reloads_total",
        "result",
        "Times that the configuration was read again, by what became of it",
    ),
    counter("trace_spans_exported_total", "", "Spans of traces that the collector has taken"),
    counter("trace_spans_dropped_total", "reason", "Spans of traces that were lost, by reason"),
    gauge("config_last_reload_successful", "", "0 where the last reading could not be used"),
    gauge(
        "config_last_reload_success_timestamp_seconds",
        "",
        "When the configuration in force was read",
    ),
    gauge(
        "build_info",
        "version python translation metrics_version",
        "Version of the proxy, of Python and of these metrics; what its workers run",
    ),
)

FAMILIES: Final = table(*_REQUESTS, *_CLASSES, *_REPLICAS, *_TENANTS, *_REGIONS, *_NOTES, *_PROXY)
