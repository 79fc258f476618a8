"""When each alert of deploy/prometheus/alerts.yaml fires, and when not, in promtool's notation.

Series: an interval is a minute, so `a+bxn` begins at a and adds b a minute, n times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

Series = Mapping[str, str]


class Case(msgspec.Struct, frozen=True):
    """After `at`, `fires` has the alert firing so many times, and `quiet` not at all."""

    alert: str
    at: str
    fires: Series
    quiet: Series
    count: int = 1


_OK: Final = 'doherty_requests_total{model="m",code="200",outcome="ok"}'
_BAD: Final = 'doherty_requests_total{model="m",code="502",outcome="replica_lost"}'
_CUT: Final = 'doherty_requests_total{model="m",code="200",outcome="stream_cut"}'
_GONE: Final = 'doherty_requests_total{model="m",code="499",outcome="client_gone"}'


def _backoff(value: str, state: str = "backoff") -> Series:
    return {f'doherty_replica_state{{replica="demo-0",state="{state}"}}': value}


def _first_tokens(work_class: str, edge: str, all_: str, in_time: str) -> Series:
    name, by = "doherty_class_time_to_first_token_seconds", f'class="{work_class}"'
    return {
        f'{name}_bucket{{{by},le="{edge}"}}': in_time,
        f"{name}_count{{{by}}}": all_,
        f'doherty_class_requests_total{{{by},outcome="ok"}}': all_,
    }


def _delays(edge_small: str, edge_large: str) -> Series:
    name = "doherty_event_loop_delay_seconds_bucket"
    edges = {"0.001": edge_small, "0.25": edge_large, "+Inf": edge_large}
    return {f'{name}{{le="{edge}"}}': values for edge, values in edges.items()}


def _ends(days: float) -> Series:
    name = 'doherty_tls_certificate_not_after_timestamp_seconds{setting="tls_cert_path"}'
    return {name: f"{days * 86400:.0f}x60"}


CASES: Final = (
    Case(
        "ProxyDown", "3m", {'up{job="doherty-proxy"}': "0x10"}, {'up{job="doherty-proxy"}': "1x10"}
    ),
    Case("ProxyDown", "3m", {'up{job="other"}': "1x10"}, {'up{job="doherty-proxy"}': "1 0 1 0 1"}),
    Case("ProxyNotReady", "3m", {"doherty_ready": "0x10"}, {"doherty_ready": "0 1 0 1 1"}),
    Case(
        "ModelNotServed",
        "8m",
        {'doherty_requests_total{model="m",code="503",outcome="no_replica"}': "0+6x10"},
        {_BAD: "0+60x10", 'doherty_requests_total{model="m",outcome="not_awake"}': "0 1 1x10"},
    ),
    Case(
        "ManagerDown",
        "5m",
        {'up{job="doherty-manager"}': "0x10"},
        {'up{job="doherty-manager"}': "1x10"},
    ),
    Case(
        "FleetStale",
        "5m",
        {"doherty_manager_silence_seconds": "0+60x10"},
        {"doherty_manager_silence_seconds": "2x10"},
    ),
    Case(
        "ProxiesUnheard",
        "5m",
        {"doherty_manager_demand_proxies": "0x10", 'up{job="doherty-proxy"}': "1x10"},
        {"doherty_manager_demand_proxies": "0x10", 'up{job="doherty-proxy"}': "0x10"},
    ),
    Case(
        "OfflineDown",
        "8m",
        {'up{job="doherty-offline"}': "0x10"},
        {'up{job="doherty-offline"}': "1x10"},
    ),
    Case("ReplicaDown", "6m", _backoff("1x10"), _backoff("1x10", "ready")),
    # Between two waits it starts.
    Case("ReplicaDown", "8m", _backoff("1 _ 1 _ 1 _ 1 _ 1 _"), _backoff("1 _ _ _ _ 1 _ _ _")),
    Case("ReplicaStartsLong", "15m", _backoff("1x30", "starting"), _backoff("1x8", "starting")),
    Case(
        "ReplicaRestarting",
        "30m",
        {'doherty_manager_restarts_total{replica="demo-0"}': "0 1 2 3 4x30"},
        {'doherty_manager_restarts_total{replica="demo-0"}': "0 1x40"},
    ),
    Case(
        "ReplicaSuspect",
        "4m",
        {
            'doherty_replica_suspect{replica="demo-0"}': "1x10",
            'doherty_replica_suspect{replica="demo-1"}': "0x10",
        },
        {'doherty_replica_suspect{replica="demo-0"}': "0 1 0 1 0"},
    ),
    Case(
        "ReplicaSilent",
        "5m",
        {
            'doherty_replica_info_age_seconds{replica="a"}': "0+60x10",
            **_backoff("1x9"),
            'doherty_replica_state{replica="a",state="ready"}': "1x10",
        },
        {
            'doherty_replica_info_age_seconds{replica="a"}': "0+60x10",
            'doherty_replica_state{replica="a",state="asleep"}': "1x10",
        },
    ),
    Case(
        "KvCacheNearlyFull",
        "15m",
        {'doherty_replica_kv_usage_ratio{replica="a"}': "0.99x20"},
        {'doherty_replica_kv_usage_ratio{replica="a"}': "0.99x5 0.9 0.99x8"},
    ),
    Case(
        "CacheHitsFallen",
        "1560m",
        {
            "doherty_prompt_tokens_total": "0+100x1600",
            "doherty_prefix_cached_tokens_total": "0+80x1400 112000+10x200",
        },
        {
            "doherty_prompt_tokens_total": "0+100x1600",
            "doherty_prefix_cached_tokens_total": "0+80x1400 112000+60x200",
        },
    ),
    Case(
        "ErrorsBurnFast",
        "70m",
        {_OK: "0+97x80", _BAD: "0+2x80", _CUT: "0+1x80"},
        {_OK: "0+99x80", _BAD: "0+1x80"},
    ),
    Case(
        "ErrorsBurnFast", "70m", {_OK: "0+97x80", _CUT: "0+3x80"}, {_OK: "0+1x80", _BAD: "0+1x80"}
    ),
    Case("ErrorsBurnFast", "70m", {_BAD: "0+5x80"}, {_OK: "0+90x80", _GONE: "0+10x80"}),
    Case(
        "ErrorsBurnSlow",
        "400m",
        {_OK: "0+99x420", _BAD: "0+1x420"},
        {_OK: "0+99x200 19800+100x220", _BAD: "0+1x200 200x220"},
    ),
    Case(
        "FirstTokenBurnFast",
        "70m",
        _first_tokens("online", "1.0", "0+100x80", "0+80x80"),
        _first_tokens("online", "1.0", "0+100x80", "0+90x80"),
    ),
    Case(
        "FirstTokenBurnFast",
        "70m",
        _first_tokens("semi-online", "10.0", "0+100x80", "0+80x80"),
        _first_tokens("offline", "1.0", "0+100x80", "0+10x80"),
    ),
    Case(
        "FirstTokenBurnSlow",
        "400m",
        _first_tokens("online", "1.0", "0+100x420", "0+90x420"),
        _first_tokens("online", "1.0", "0+100x420", "0+97x420"),
    ),
    Case(
        "QueueNearlyFull",
        "5m",
        {
            'doherty_queue_depth{class="online"}': "900x10",
            'doherty_queue_depth_max{class="online"}': "1000x10",
        },
        {
            'doherty_queue_depth{class="online"}': "500x10",
            'doherty_queue_depth_max{class="online"}': "1000x10",
        },
    ),
    Case(
        "OnlineWaits",
        "5m",
        {'doherty_queue_oldest_seconds{class="online"}': "12x10"},
        {
            'doherty_queue_oldest_seconds{class="offline"}': "500x10",
            'doherty_queue_oldest_seconds{class="online"}': "1x10",
        },
    ),
    Case(
        "RequestsRefused",
        "12m",
        {'doherty_requests_total{model="m",code="429",outcome="queue_full"}': "0+60x20"},
        {'doherty_requests_total{model="m",code="429",outcome="rate_limit_exceeded"}': "0+60x20"},
    ),
    Case(
        "DeadlinesMissed",
        "25m",
        {
            'doherty_deadline_met_total{class="online"}': "0+60x30",
            'doherty_deadline_missed_total{class="online"}': "0+10x30",
            'doherty_deadline_shed_total{class="online"}': "0+10x30",
        },
        {
            'doherty_deadline_met_total{class="online"}': "0+60x30",
            'doherty_deadline_missed_total{class="online"}': "0+1x30",
            'doherty_deadline_shed_total{class="online"}': "0x30",
        },
    ),
    Case(
        "TenantRefused",
        "45m",
        {'doherty_tenant_rate_limited_total{tenant="t",limit="requests"}': "0+60x60"},
        {'doherty_tenant_rate_limited_total{tenant="t",limit="requests"}': "0+60x10 600x50"},
    ),
    Case("EventLoopSlow", "15m", _delays("0+90x20", "0+120x20"), _delays("0+120x20", "0+120x20")),
    Case(
        "WorkerRestarts",
        "10m",
        {"doherty_worker_restarts_total": "0 0 1x10"},
        {"doherty_worker_restarts_total": "3x20"},
    ),
    Case(
        "InternalErrors",
        "10m",
        {"doherty_internal_errors_total": "0 0 1x10"},
        {"doherty_internal_errors_total": "3x20"},
    ),
    Case(
        "DescriptorsNearlyOut",
        "8m",
        {
            'doherty_worker_open_fds{worker="0"}': "900x10",
            'doherty_worker_max_fds{worker="0"}': "1024x10",
        },
        {
            'doherty_worker_open_fds{worker="0"}': "900x10",
            'doherty_worker_max_fds{worker="0"}': "65536x10",
        },
    ),
    Case(
        "ConnectionsRefused",
        "4m",
        {"doherty_connections_refused_total": "0 0 5x10"},
        {"doherty_connections_refused_total": "5x20"},
    ),
    Case(
        "ConfigNotReloaded",
        "3m",
        {"doherty_config_last_reload_successful": "0x10"},
        {"doherty_config_last_reload_successful": "1x10"},
    ),
    Case(
        "AccessLogDropped",
        "10m",
        {"doherty_access_log_dropped_total": "0 0 9x10"},
        {"doherty_access_log_dropped_total": "9x20"},
    ),
    Case(
        "UsageLogDropped",
        "10m",
        {"doherty_usage_log_dropped_total": "0 0 9x10"},
        {"doherty_usage_log_dropped_total": "9x20"},
    ),
    Case("CertificateEnds", "1m", _ends(10), _ends(20)),
    Case("CertificateEndsSoon", "1m", _ends(1), _ends(10)),
    Case(
        "KeysStale",
        "6m",
        {"doherty_keys_age_seconds": "0+60x10"},
        {"doherty_keys_age_seconds": "1x10"},
    ),
    Case(
        "JwtKeysStale",
        "25m",
        {"doherty_jwt_keys_age_seconds": "0+60x30", "doherty_jwt_keys_failures_total": "0+1x30"},
        {"doherty_jwt_keys_age_seconds": "0+60x30", "doherty_jwt_keys_failures_total": "0x30"},
    ),
    Case(
        "RegionUnlinked",
        "4m",
        {'doherty_remote_linked{remote="eu/1",region="eu"}': "0x10"},
        {'doherty_remote_linked{remote="eu/1",region="eu"}': "0 1 0 1 0"},
    ),
    Case(
        "HopsRefused",
        "5m",
        {'doherty_hops_refused_total{reason="unsigned"}': "0 0 3x10"},
        {'doherty_hops_refused_total{reason="unsigned"}': "3x10"},
    ),
    Case(
        "ScaleUpStuck",
        "20m",
        {
            'doherty_manager_scale_desired{pool="p"}': "3x30",
            'doherty_manager_scale_ready{pool="p"}': "1x30",
        },
        {
            'doherty_manager_scale_desired{pool="p"}': "3x30",
            'doherty_manager_scale_ready{pool="p"}': "1x10 3x20",
        },
    ),
    Case(
        "PoolAtMaximum",
        "20m",
        {
            'doherty_manager_scale_panicking{pool="p"}': "1x30",
            'doherty_manager_scale_desired{pool="p"}': "4x30",
            'doherty_manager_scale_max{pool="p"}': "4x30",
            'doherty_manager_scale_min{pool="p"}': "1x30",
        },
        {
            'doherty_manager_scale_panicking{pool="p"}': "1x30",
            'doherty_manager_scale_desired{pool="p"}': "3x30",
            'doherty_manager_scale_max{pool="p"}': "4x30",
            'doherty_manager_scale_min{pool="p"}': "1x30",
        },
    ),
    Case(
        "BatchDue",
        "8m",
        {"doherty_offline_due_seconds": "3000x10"},
        {"doherty_offline_due_seconds": "80000x10"},
    ),
    Case(
        "BatchesStand",
        "35m",
        {
            'doherty_offline_lines{state="waiting"}': "50x40",
            "doherty_offline_results_total": "7x40",
        },
        {
            'doherty_offline_lines{state="waiting"}': "50x40",
            "doherty_offline_results_total": "0+1x40",
        },
    ),
    Case(
        "OfflineResultsDropped",
        "30m",
        {
            "doherty_offline_results_dropped_total": "0+5x40",
            "doherty_offline_results_total": "0+10x40",
        },
        {
            "doherty_offline_results_dropped_total": "0+5x40",
            "doherty_offline_results_total": "0+1000x40",
        },
    ),
)
