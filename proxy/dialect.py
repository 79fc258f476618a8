"""Flags of other routers that `doherty proxy` does not have, and what to say instead.

Launch scripts of sglang-router, Shepherd Model Gateway and vllm-router come with flags for things
that are done otherwise here, or not at all. Whoever brings one is told which, in one line; to take
it in silence would promise what is not kept. Those that mean the same have the same name in
`config`, and need no entry. Names are those of sglang-router 0.3.2, smg 1.13.0, vllm-router 0.1.17
and the router of vLLM's production stack; deploy/guides/migrate.md has them as a table.
"""

from __future__ import annotations

import re
from collections.abc import Container

_PRICED = "a replica's price in seconds has nothing to set (deploy/guides/routing.md); leave it out"
_NO_SPLIT = "prefill and decode are not served apart here; name whole replicas in --worker-urls"
_NO_TOKENIZER = (
    "no tokenizer, template or parser is needed: bodies go on as they came; leave it out"
)
_NO_STORE = "answers and conversations are not kept here, engines keep theirs; leave it out"
_NO_CLUSTER = (
    "nothing is discovered in Kubernetes: name replicas in --worker-urls, whose reload loses no "
    "request, or have a manager start them (doherty up)"
)
_FILED = "say it in the configuration file, under tenants and classes (--config FILE)"

# Patterns of names without their dashes, the first that fits counts.
REMARKS: tuple[tuple[str, str], ...] = (
    ("prometheus-port", "metrics are on the admin listener: --admin-port"),
    ("prometheus-host", "metrics are on the admin listener: --admin-host"),
    ("prometheus-duration-buckets", "buckets are fixed, to 600 s; leave it out"),
    ("health-check-port", "health is on the admin listener, too: --admin-port"),
    (
        r"cb-(failure-threshold|success-threshold|timeout-duration-secs|window-duration-secs)"
        r"|disable-circuit-breaker",
        "there is no breaker to set: a replica that refuses or dies takes no requests until a "
        "probe finds it well; leave it out",
    ),
    (
        r"retry-(initial-backoff-ms|max-backoff-ms|backoff-multiplier|jitter-factor)",
        "a retry goes to another replica at once; leave it out (--retry-max-retries)",
    ),
    (
        r"health-(failure|success)-threshold|disable-health-check|remove-unhealthy-workers"
        r"|worker-(auto-recovery|stale-secs|stall-secs|wedge-secs|startup-.*|warmup-.*)",
        "one failure makes a replica suspect, and one good probe well again; leave it out",
    ),
    (
        r"cache-(threshold|match-threshold|boundaries|index|ttl-secs)|balance-.*|overlap-decay"
        r"|eviction-interval(-secs)?|max-tree-size|max-idle-secs|bucket-adjust-interval-secs"
        r"|spill-.*|least-load-.*|power-of-two-.*|prefix-(hash|token)-.*|selection-.*|block-size"
        r"|router-temperature|kv-penalty-.*|kv-index|load-monitor-interval|disable-load-monitoring"
        r"|worker-overload-.*|disable-worker-overload-protection|overload-.*",
        _PRICED,
    ),
    (
        r"sticky-.*|assignment-mode|routing-key-.*|kv-aware-session-affinity-ttl-secs|session-key",
        "sessions are known by their usual names (deploy/guides/routing.md); to keep to them, "
        "--session-affinity strict",
    ),
    (
        r"kv-event-.*|kv-aware-threshold",
        "engines are asked where their events are; if they do not say, --kv-events-port",
    ),
    (
        r"(prefill|decode|encode)(-.*)?|(pd|epd|vllm-pd)-.*|mini-lb|kv-connector.*|kv-engine-.*"
        r"|bucket-.*|vllm-discovery-address",
        _NO_SPLIT,
    ),
    (
        r"dp-.*|intra-node-data-parallel-size",
        "ranks of a replica are found and routed to; name the replica once and leave it out",
    ),
    (
        r"service-discovery.*|selector|router-selector|model-id-from|k8s-.*|discovery-.*",
        _NO_CLUSTER,
    ),
    ("verbose", "use --log-level debug"),
    ("log-format", "use --log-json, or leave it out"),
    ("max-instance-failover-reroute-attempts", "use --retry-max-retries"),
    ("static-backends", "name them in --worker-urls, with blanks in place of commas"),
    (
        r"static-.*|model-alias",
        "models are asked of the replicas; one that is to have another name gets it from its "
        "engine (--served-model-name)",
    ),
    ("routing-logic", "use --policy: prefix, session, least_load, round_robin or random"),
    ("dynamic-config-.*", "use --config FILE, which is read again when it changes"),
    (
        r"enable-batch-api|file-storage-.*|batch-processor",
        "doherty offline serves files and batches; name it in --offline-url",
    ),
    ("engine-stats-interval", "use --scrape-interval-secs"),
    ("sse-keepalive-secs", "use --keepalive-comment-secs"),
    (
        "stream-body-stall-timeout-secs|backend-health-check-timeout-seconds",
        "use --request-timeout-secs and --health-check-timeout-secs",
    ),
    ("ca-cert-paths", "use --ca-cert-path, a file of all of them"),
    (
        r"mesh-.*|enable-mesh",
        "proxies are linked by --peer-listen, --peers and --peer-key",
    ),
    (
        r"rate-limit-.*|tenant-(api-key|header-name|rate-limit-.*)|trust-tenant-header|priority-scheduler-.*",
        _FILED,
    ),
    (r"jwt-.*", "say it in the configuration file, under jwt (--config FILE)"),
    (r"control-plane-.*", "the admin listener has one key: --admin-api-key"),
    (
        r"model-path|model|tokenizer-.*|chat-template|reasoning-parser|tool-call-parser|parser"
        r"|disable-tokenizer-autoload|backend|mm-.*|multimodal-.*",
        _NO_TOKENIZER,
    ),
    (r"history-.*|oracle-.*|postgres-.*|redis-.*|schema-config|storage-.*", _NO_STORE),
    ("enable-igw", "several models are always served; leave it out"),
    ("request-id-headers", "x-request-id is taken, answered and sent on; leave it out"),
    ("log-dir", "logs go to standard error, the access log where --access-log FILE says"),
    (
        r"(header-read|idle-connection|upstream-pool-idle)-timeout-secs|upstream-http2"
        r"|max-buffered-request-bytes|max-background-responses|job-queue-.*",
        "it is bounded by itself (proxy/core/limits.py); leave it out",
    ),
    ("otel-endpoint", "use --otlp-traces-endpoint, a URL for OTLP over HTTP"),
    (
        "otel-service-name|otel-secure",
        "as OpenTelemetry has it: OTEL_SERVICE_NAME, and https in --otlp-traces-endpoint",
    ),
    (
        r"cors-allowed-origins|mcp-.*|(enable-)?wasm.*|.*program-scheduling.*|callbacks"
        r"|request-rewriter|feature-gates|sentry-.*|enable-rl|rl-.*|rdma-.*|zmq-.*|jemalloc-.*|log-mm-.*"
        r"|router-disable-arg-fallback|external-providers-config|semantic-cache-.*|log-stats.*|request-stats-window|lmcache-.*",
        "there is nothing of the kind here; leave it out",
    ),
)


def remark(flag: str, ours: Container[str] = ()) -> str | None:
    """Return what to say to whoever brings `--flag`; None if no router that we know has it.

    `ours` are our own flags. A command that starts sglang-router together with engines
    (`sglang_router.launch_server`) has its flags with `router-` before them.
    """
    name = flag.removeprefix("--").partition("=")[0]
    bare = name.removeprefix("router-")
    if bare != name and f"--{bare}" in ours:
        return f"use --{bare}"
    found = (
        words
        for pattern, words in REMARKS
        if re.fullmatch(pattern, name) or re.fullmatch(pattern, bare)
    )
    return next(found, None)
