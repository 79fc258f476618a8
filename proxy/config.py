"""The configuration, defined once: sections, defaults, units and the words that explain them.

Everything else is derived from these structs: the strict YAML reader (an unknown key is an error
with its line and the nearest valid name), the JSON schema (`config_schema`), the reference, the
flags of `doherty proxy` and their environment twins. Precedence: flag, then `DOHERTY_*`, then file,
then default. Flags follow the dialect of sglang-router and vllm-router where that dialect has the
thing, so that launch scripts port over.

What models are served by is in `config_models`, how a file is read in `config_reading`; both planes
read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from proxy.config_access import (
    AccessConfig,
    ClassesConfig,
    JwtConfig,
    ModelAccess,
    RemoteRegionConfig,
    TenantConfig,
    check_claims,
)
from proxy.config_checks import check_pool, image_of
from proxy.config_machines import DockerConfig, RayConfig, ReclaimNoticeConfig
from proxy.config_manager import ManagerConfig
from proxy.config_models import AutoscaleConfig, ModelConfig, PoolConfig, Serves, WorkClass
from proxy.config_offline import OfflineConfig
from proxy.config_reading import (
    ConfigError,
    Count,
    Key,
    Name,
    Path,
    Port,
    PositiveInt,
    Seconds,
    Section,
    ShownKey,
    describe_fields,
    laid_over,
    read_text,
    read_yaml,
)
from proxy.config_telemetry import (
    AccessLogRatio,
    EnableTrace,
    LogJson,
    TraceContext,
    TraceSampleRatio,
    TracesEndpoint,
)

# Beside what is defined here.
__all__ = (
    "AccessConfig",
    "AutoscaleConfig",
    "ClassesConfig",
    "ConfigError",
    "DockerConfig",
    "JwtConfig",
    "ManagerConfig",
    "ModelConfig",
    "OfflineConfig",
    "PoolConfig",
    "RayConfig",
    "ReclaimNoticeConfig",
    "RemoteRegionConfig",
    "Serves",
    "TenantConfig",
    "WorkClass",
    "describe_fields",
)

VERSION = 1  # of the form of the file: raised when a file of before would mean something else
ENVIRONMENT_PREFIX = "DOHERTY_"

Affinity = Literal["soft", "strict"]
Policy = Literal["prefix", "session", "least_load", "round_robin", "random"]
ClientAuth = Literal["off", "optional", "required"]
KvEvents = Literal["auto", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]

# What the routers that people come from call the same thing, by key.
ALIASES = {
    "policy": {
        "cache_aware": "prefix",
        "consistent_hash": "prefix",
        "consistent_hashing": "prefix",
        "kv_aware": "prefix",
        "prefix_hash": "prefix",
        "power_of_two": "least_load",
        "manual": "session",
        "sticky_least_loaded": "session",
    },
    "log_level": {"warn": "warning"},
}


class ProxyConfig(Section, frozen=True, kw_only=True):
    """The data plane."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port to listen on; 0 takes a free one")] = 8000
    admin_host: Annotated[str, Meta(description="address of the admin listener")] = "127.0.0.1"
    admin_port: Annotated[
        Port, Meta(description="port of the admin listener (metrics, health, replicas)")
    ] = 8001
    workers: Annotated[
        int, Meta(ge=1, le=256, description="worker processes that share the port (SO_REUSEPORT)")
    ] = 1
    worker_urls: Annotated[
        tuple[str, ...], Meta(description="engine servers, when no manager names them")
    ] = ()
    manager_url: Annotated[
        str | None,
        Meta(description="manager to watch for the fleet, such as http://127.0.0.1:8002"),
    ] = None
    policy: Annotated[
        Policy,
        Meta(
            description="how a replica is chosen; cache_aware, power_of_two and other routers' "
            "names are understood as their nearest equals"
        ),
    ] = "prefix"
    session_affinity: Annotated[
        Affinity,
        Meta(
            description="a request that names a session: soft prefers the session's home, strict "
            "keeps to it while it lives, however busy it is"
        ),
    ] = "soft"
    api_key: Annotated[
        ShownKey | None,
        Meta(description="key that clients must present; it goes on to the engines with a request"),
    ] = None
    tenant_isolation: Annotated[
        bool,
        Meta(
            description="requests with different keys share no home and no cached prefix, here "
            "and in the engines"
        ),
    ] = False
    admin_api_key: Annotated[
        Key | None, Meta(description="key of the admin listener's pages other than health")
    ] = None
    max_payload_size: Annotated[PositiveInt, Meta(description="largest request body, in bytes")] = (
        32 * 1024 * 1024
    )
    max_concurrent_requests: Annotated[
        PositiveInt, Meta(description="requests in flight per worker; more are answered 429")
    ] = 8192
    queue_size: Annotated[
        Count,
        Meta(
            description="requests per worker that wait while every replica has enough to do; more "
            "are answered 429; 0: none waits, each is sent at once"
        ),
    ] = 4096  # half of the requests in flight, so that those that wait never shut out the others
    queue_timeout_secs: Annotated[
        Seconds, Meta(description="time that a request may wait so; then it is answered 408")
    ] = 60.0
    connect_timeout_secs: Annotated[Seconds, Meta(description="time to connect to a replica")] = 5.0
    request_timeout_secs: Annotated[
        Seconds, Meta(description="longest silence of a replica while a request is under way")
    ] = 600.0
    retry_max_retries: Annotated[
        Count, Meta(description="further replicas to try while none can have begun the request")
    ] = 3
    disable_retries: Annotated[bool, Meta(description="answer the first failure")] = False
    health_check_endpoint: Annotated[
        str, Meta(pattern=r"^/[!-~]*$", description="path that a suspect replica must answer 200")
    ] = "/health"
    health_check_interval_secs: Annotated[
        float, Meta(ge=0.05, description="longest pause between probes of a suspect replica")
    ] = 1.0
    health_check_timeout_secs: Annotated[
        float, Meta(ge=0.05, description="time that a probe may take")
    ] = 3.0
    scrape_interval_secs: Annotated[
        float,
        Meta(
            ge=0,
            description="pause between readings of the metrics of --worker-urls engines; 0: none",
        ),
    ] = 1.0
    kv_events: Annotated[
        KvEvents,
        Meta(description="whether what engines tell of their KV caches is heard: auto or off"),
    ] = "auto"
    kv_events_port: Annotated[
        Port,
        Meta(description="port of it where an engine does not say; its ranks' follow; 0: none"),
    ] = 0
    kv_events_replay_port: Annotated[
        Port, Meta(description="port at which they tell past events again; 0: they do not")
    ] = 0
    shutdown_grace_period_secs: Annotated[
        Seconds, Meta(description="time that requests in flight may take after SIGTERM")
    ] = 60.0
    drain_settle_secs: Annotated[
        Seconds, Meta(description="time between turning unready and closing the port")
    ] = 0.0
    access_log: Annotated[
        str, Meta(description="file for the access log, '-' for standard output, 'off' for none")
    ] = "-"
    access_log_ratio: AccessLogRatio = 1.0
    log_level: Annotated[LogLevel, Meta(description="least severe event that is logged")] = "info"
    log_json: LogJson = False
    enable_trace: EnableTrace = False
    otlp_traces_endpoint: TracesEndpoint = None
    trace_sample_ratio: TraceSampleRatio = None
    trace_context: TraceContext = "continue"
    expose_routing: Annotated[
        bool, Meta(description="name the replica and the decision in response headers")
    ] = False
    region: Annotated[
        Name, Meta(description="region of this proxy, where it is not the one of the whole file")
    ] = "local"
    peer_listen: Annotated[
        Path | None,
        Meta(
            description="HOST:PORT or unix:PATH where the other proxies of the region link to this "
            "one, to share what they decide"
        ),
    ] = None
    peers: Annotated[
        tuple[Path, ...],
        Meta(
            description="addresses at which the other proxies of the region listen for peers; "
            "this one's own may be among them; dns:NAME:PORT is every address of the name"
        ),
    ] = ()
    peer_key: Annotated[
        Key | None,
        Meta(description="secret that all proxies of the region know, and by which links are kept"),
    ] = None
    upgrade_socket: Annotated[
        Path | None,
        Meta(description="unix socket by which a new proxy may take over (see --takeover)"),
    ] = None
    upgrade_grace_period_secs: Annotated[
        Seconds, Meta(description="time that requests may take once a new proxy has taken over")
    ] = 3600.0
    tls_cert_path: Annotated[
        Path | None, Meta(description="certificate chain of the listener, PEM; makes it HTTPS")
    ] = None
    tls_key_path: Annotated[Path | None, Meta(description="private key of that certificate")] = None
    tls_client_auth: Annotated[
        ClientAuth, Meta(description="certificates of clients: off, optional or required")
    ] = "off"
    tls_client_ca_path: Annotated[
        Path | None, Meta(description="authorities that issue the certificates of clients")
    ] = None
    ca_cert_path: Annotated[
        Path | None,
        Meta(description="authorities that replicas are verified by (default: the system's)"),
    ] = None
    client_cert_path: Annotated[
        Path | None, Meta(description="certificate chain that is shown to replicas")
    ] = None
    client_key_path: Annotated[Path | None, Meta(description="private key of that certificate")] = (
        None
    )
    verify_replica_tls: Annotated[
        bool, Meta(description="verify the certificates and names of replicas with https URLs")
    ] = True
    queue_bytes: Annotated[
        PositiveInt, Meta(description="bodies of those requests, in bytes per worker")
    ] = 512 * 1024 * 1024
    hold_timeout_secs: Annotated[
        Seconds, Meta(description="time that a request may wait for a model of which none is awake")
    ] = 600.0  # as long as the official clients wait for an answer
    keepalive_comment_secs: Annotated[
        Seconds,
        Meta(description="pause between comments to a stream that waits (status 200); 0: none"),
    ] = 0.0
    offline_url: Annotated[
        str | None,
        Meta(
            description="service that /v1/files and /v1/batches go to, such as "
            "http://127.0.0.1:8003 (default: none, these are 404)"
        ),
    ] = None
    keys_path: Annotated[
        Path | None,
        Meta(description="file of API keys, as `doherty keys` keeps it (default: the manager's)"),
    ] = None
    internal_key: Annotated[
        Key | None, Meta(description="secret shared with the offline service (`up` draws one)")
    ] = None
    usage_log: Annotated[
        str, Meta(description="file for usage records, one JSON line each; '-' or 'off'")
    ] = "off"
    quota_path: Annotated[
        Path | None, Meta(description="file of this proxy that keeps what tenants used of the day")
    ] = None
    access: Annotated[
        AccessConfig,
        Meta(description="said at the top of the file: tenants, jwt, classes, regions, models"),
    ] = AccessConfig()


# Sockets and processes of a proxy that runs: a change of these waits for an upgrade.
FIXED = (
    *("host", "port", "workers", "admin_host", "admin_port", "admin_api_key"),
    "upgrade_socket",
)


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    version: Annotated[
        int, Meta(ge=1, description="form of this file; a newer one than is known is refused")
    ] = VERSION
    region: Annotated[Name, Meta(description="name of the region that this file is for")] = "local"
    proxy: Annotated[ProxyConfig, Meta(description="the data plane")] = ProxyConfig()
    manager: Annotated[ManagerConfig, Meta(description="the control plane")] = ManagerConfig()
    offline: Annotated[OfflineConfig, Meta(description="jobs: Files and Batches")] = OfflineConfig()
    models: Annotated[tuple[ModelConfig, ...], Meta(description="what is served")] = ()
    tenants: Annotated[tuple[TenantConfig, ...], Meta(description="who may ask")] = ()
    jwt: Annotated[JwtConfig | None, Meta(description="tokens in place of keys")] = None
    classes: Annotated[ClassesConfig, Meta(description="who goes first")] = ClassesConfig()
    remote_regions: Annotated[
        tuple[RemoteRegionConfig, ...], Meta(description="proxies of other regions")
    ] = ()

    @property
    def access(self) -> AccessConfig:
        """Return what proxies must know of all this."""
        models = {
            model.name: ModelAccess(
                regions=model.regions,
                prompt_price=model.prompt_price,
                cached_price=(
                    model.prompt_price if model.cached_price is None else model.cached_price
                ),
                completion_price=model.completion_price,
            )
            for model in self.models
        }
        return AccessConfig(
            tenants=self.tenants,
            jwt=self.jwt,
            classes=self.classes,
            remote_regions=self.remote_regions,
            models=models,
        )

    def __post_init__(self) -> None:
        """Refuse what is defined twice, and what contradicts another part."""
        check_claims(self.region, self.tenants, self.remote_regions, self.models)
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"model '{name}' is defined twice; give it several pools instead")
        for model in self.models:
            for pool in model.pools:
                check_pool(model.name, pool, self.manager, self.offline)

    def image_of(self, pool: PoolConfig) -> str:
        """Return the image that its containers are made of; empty where they are processes."""
        return image_of(pool, self.manager)


# What `doherty up` runs when nobody says otherwise.
EMBEDDED_DEFAULT = """\
models:
  - name: demo
    pools:
      - engine: simulator
        replicas: 2
        args: [--profile, h200-8b, --max-model-len, "131072"]
"""


def load_config(path: str) -> Config:
    """Read the file at `path`. Raises `ConfigError` naming the file, the line and the remedy."""
    return parse_config(read_text(path), path)


def parse_config(text: str, source: str) -> Config:
    """Return the configuration in `text`; `source` names it in errors. Raises `ConfigError`."""
    return read_yaml(text, source, Config, _respell)


_NO_ACCESS = msgspec.json.decode(msgspec.json.encode(AccessConfig()))


def _respell(value: Any) -> None:
    """Take what people write for what they mean. Raises `msgspec.ValidationError`."""
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > VERSION:  # before a key that is not known yet
        raise msgspec.ValidationError(
            f"{version} is of a newer release; this one knows {VERSION}: upgrade Doherty, or "
            "write the file as this release has it - at `$.version`"
        )
    proxy = value.get("proxy") if isinstance(value, dict) else None
    if not isinstance(proxy, dict):
        return
    if msgspec.to_builtins(proxy.get("access") or _NO_ACCESS) != _NO_ACCESS:
        raise msgspec.ValidationError(
            "say tenants, jwt, classes and so on at the top of the file - at `$.proxy.access`"
        )
    for name in ALIASES.keys() & proxy.keys():
        proxy[name] = _respelt(name, proxy[name])
    for name in ("access_log", "kv_events", "tls_client_auth"):
        if proxy.get(name) is False:  # YAML 1.1 reads a bare off so
            proxy[name] = "off"


def override(base: ProxyConfig, values: Mapping[str, Any], source: str) -> ProxyConfig:
    """Return `base` with `values` (from flags or the environment) laid over it, checked."""
    respelt = {name: _respelt(name, value) for name, value in values.items()}
    return laid_over(base, respelt, source)


def _respelt(name: str, value: Any) -> Any:
    return ALIASES.get(name, {}).get(value, value) if isinstance(value, str) else value
