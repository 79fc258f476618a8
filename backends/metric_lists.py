"""Every metric of the control plane, once: of the manager, the offline service, an engine worker.

As in `proxy/io/families.py`, and in one form: the pages are made from these lists. Label values are
names of pools, replicas, rungs and states: all from the configuration or from our own code.
"""

from __future__ import annotations

from typing import Final

from proxy.contract.metrics import PREFIX, counter, gauge, histogram, table

WAKE_BUCKETS_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
MANAGER_PREFIX: Final = PREFIX + "manager_"
OFFLINE_PREFIX: Final = PREFIX + "offline_"
ENGINE_WORKER_PREFIX: Final = PREFIX + "worker_"

_BUILD: Final = gauge(
    "build_info",
    "version python metrics_version",
    "Version of the service, of Python and of its metrics",
)

MANAGER: Final = table(
    gauge("replicas", "state", "Replicas by state"),
    gauge("engine_workers", "state", "Engine workers by state"),
    counter("restarts_total", "replica", "Starts of a replica after its first"),
    counter("scrape_failures_total", "replica", "Readings of a replica's load that failed"),
    gauge("fleet_version", "", "Snapshots published"),
    gauge("watchers", "", "Proxies that watch the fleet"),
    gauge("demand_proxies", "", "Proxies that report their demand"),
    gauge("gpus", "state", "GPUs, by whether leased"),
    gauge("scale_desired", "pool", "Replicas that should serve"),
    gauge("scale_ready", "pool", "Replicas that serve"),
    gauge("scale_coming", "pool", "Replicas on their way up"),
    gauge("scale_min", "pool", "Fewest replicas, as configured"),
    gauge("scale_max", "pool", "Most replicas, as configured"),
    gauge("scale_presses", "pool", "Whether its jobs have moved up a class"),
    gauge("scale_panicking", "pool", "Whether a burst is under way"),
    gauge("scale_term", "pool term", "What entered the last decision"),
    gauge("scale_resting", "pool rung", "Replicas at rest, by rung"),
    counter(
        "decisions_total", "pool direction", "Changes of a pool's desired size, and moves without"
    ),
    histogram(
        "wake_seconds", "from", "Time until a replica served, by where it came from", WAKE_BUCKETS_S
    ),
    _BUILD,
)

OFFLINE: Final = table(
    gauge("jobs", "state", "Batches by state"),
    gauge("lines", "state", "Lines of batches that have not ended, by state"),
    gauge("files", "", "Files"),
    gauge("stored_bytes", "", "Content of all files and results"),
    gauge("due_seconds", "", "Time until the next batch in progress expires"),
    counter("asks_total", "", "Times that a worker asked for lines"),
    counter("chunks_total", "", "Chunks given out"),
    counter("lines_given_total", "", "Lines given out, again each time"),
    counter("reports_total", "", "Reports of workers"),
    counter("results_total", "", "Results that counted"),
    counter(
        "results_dropped_total",
        "",
        "Results that came too late, twice, or for a job that had ended",
    ),
    counter("prompt_tokens_total", "", "Prompt tokens of lines"),
    counter("cached_tokens_total", "", "Those of them that an engine had in its cache"),
    counter("completion_tokens_total", "", "Tokens of answers"),
    counter("uploaded_bytes_total", "", "Octets of files uploaded"),
    gauge("uploads", "", "Uploads in progress"),
    gauge(
        "worker_tokens_per_second",
        "worker",
        "Tokens of a worker in the last minute, prompts and answers",
    ),
    gauge(
        "spare_lines_max", "models", "Lines that may be in flight on replicas with room to spare"
    ),
    gauge("spare_in_flight", "models", "Lines in flight on these"),
    gauge("spare_tokens_per_second", "models", "Tokens of such lines lately"),
    counter("spare_attempts_total", "models outcome", "How attempts at such lines ended"),
    _BUILD,
)

ENGINE_WORKER: Final = table(
    counter("lines_total", "outcome", "Lines that have left this worker, by outcome"),
    counter("prompt_tokens_total", "", "Prompt tokens of lines"),
    counter("cached_tokens_total", "", "Those of them that were in the cache"),
    counter("completion_tokens_total", "", "Tokens of answers"),
    counter("busy_gpu_seconds_total", "", "GPU-seconds with lines in hand"),
    counter("desk_failures_total", "", "Calls of the desk that failed"),
    gauge("tokens_per_second", "", "Prompt and answer tokens of what finished lately"),
    gauge("lines_waiting", "", "Lines that wait in the engine"),
    gauge("lines_running", "", "Lines that the engine computes"),
    gauge("chunks_held", "", "Chunks in hand"),
    gauge("kv_cache_usage_ratio", "", "KV cache in use"),
)
