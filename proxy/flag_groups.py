"""The flags of `doherty proxy` in groups, by the names of the settings."""

from __future__ import annotations

FURTHER = "further settings"
# A name that ends in `*` stands for all that begin so.
GROUPS: dict[str, tuple[str, ...]] = {
    "listening": (
        *("host", "port", "workers", "admin_host", "admin_port", "max_payload_size", "tls_*"),
        *("upgrade_*", "shutdown_grace_period_secs", "drain_settle_secs"),
    ),
    "replicas": (
        *("worker_urls", "manager_url", "offline_url", "connect_timeout_secs", "health_check_*"),
        *("scrape_*", "kv_events*", "ca_cert_path", "client_*", "verify_replica_tls"),
    ),
    "choosing a replica": ("policy", "session_affinity", "tenant_isolation", "expose_routing"),
    "waiting and trying again": (
        *("max_concurrent_requests", "queue_*", "hold_*", "request_timeout_secs", "retry_*"),
        *("disable_retries", "keepalive_*"),
    ),
    "keys and accounts": (
        *("api_key", "admin_api_key", "keys_path", "internal_key", "usage_log", "quota_path"),
    ),
    "regions": ("region", "peer*"),
    "logs and traces": ("access_log*", "log_*", "enable_trace", "trace_*", "otlp_*"),
}


def group_of(name: str) -> str:
    """Return the group that a setting belongs to."""
    for group, patterns in GROUPS.items():
        for pattern in patterns:
            bare = pattern.removesuffix("*")
            if name == bare or (pattern.endswith("*") and name.startswith(bare)):
                return group
    return FURTHER
