"""The configuration, defined once: sections, defaults, units and the words that explain them.

Everything else is derived from these structs: the strict YAML reader (an unknown key is an error
with its line and the nearest valid name), the JSON schema, the flags of `doherty proxy` and their
environment twins. Precedence: flag, then `DOHERTY_*`, then file, then default. Flags follow the
dialect of sglang-router and vllm-router where that dialect has the thing, so that launch scripts
port over.

Imports nothing of ours but `yaml_marks`; both planes read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from proxy.yaml_marks import explain, repeated_key

ENVIRONMENT_PREFIX = "DOHERTY_"

Port = Annotated[int, Meta(ge=0, le=65535)]
PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Key = Annotated[str, Meta(min_length=1)]  # an empty one would open what it should close
Path = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(ge=0)]
Affinity = Literal["soft", "strict"]
Policy = Literal["prefix", "session", "least_load", "round_robin", "random"]
ClientAuth = Literal["off", "optional", "required"]
KvEvents = Literal["auto", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]
_CARD = r"(\d{1,3}(-\d{1,3})?|(GPU|MIG)-[A-Za-z0-9/-]+)"
_CARDS = re.compile(rf"auto|none|{_CARD}(, ?{_CARD})*")
_SPAN = re.compile(r"(?<![\w-])(\d+)-(\d+)(?![\w-])")
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]

# What the routers that people come from call the same thing.
POLICY_ALIASES = {
    "cache_aware": "prefix",
    "consistent_hash": "prefix",
    "prefix_hash": "prefix",
    "power_of_two": "least_load",
    "manual": "session",
}


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the file; unknown keys are errors."""


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
            description="how a replica is chosen; cache_aware, consistent_hash, power_of_two and "
            "manual are understood as their nearest equals"
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
        Key | None,
        Meta(description="key that clients must present; it goes on to the engines with a request"),
    ] = None
    tenant_isolation: Annotated[
        bool, Meta(description="requests with different keys share no known prefix and no home")
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
    log_level: Annotated[LogLevel, Meta(description="least severe event that is logged")] = "info"
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
            "this one's own may be among them"
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


class ManagerConfig(Section, frozen=True, kw_only=True):
    """The control plane."""

    host: Annotated[str, Meta(description="address of the manager's API")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port of the manager's API")] = 8002
    run_dir: Annotated[str, Meta(description="folder for the journal and the engines' logs")] = (
        ".doherty"
    )
    scrape_interval_secs: Annotated[
        float, Meta(ge=0.05, description="pause between readings of an engine's metrics")
    ] = 1.0
    restart_backoff_secs: Annotated[
        Seconds, Meta(description="pause before the first restart of a replica; doubles each time")
    ] = 0.5
    restart_backoff_max_secs: Annotated[
        Seconds, Meta(description="longest pause between restarts")
    ] = 30.0
    gpus: Annotated[
        str | Count | tuple[str | Count, ...],
        Meta(
            description="GPUs to lease to replicas: auto (what nvidia-smi lists), none (leave that "
            "to engines), or a list such as 0,2-3 (UUIDs and MIG instances, too)"
        ),
    ] = "auto"
    warm_page_cache: Annotated[
        bool, Meta(description="read weights and compile caches into memory beside a start")
    ] = True

    @property
    def cards(self) -> str:
        """`gpus` as one text."""
        return ",".join(map(str, self.gpus)) if isinstance(self.gpus, tuple) else str(self.gpus)

    def __post_init__(self) -> None:
        """Refuse a list that names no cards, or seems to and names none (a range 2-0)."""
        spans = _SPAN.findall(self.cards)
        if not _CARDS.fullmatch(self.cards) or any(int(a) > int(b) for a, b in spans):
            raise ValueError(
                f"gpus: '{self.cards}' is none of auto, none, or a list such as 0,2-3 or "
                "GPU-8932f937 (names of nvidia-smi, ranges upwards)"
            )


class PoolConfig(Section, frozen=True, kw_only=True):
    """Replicas of one model that share an engine and its settings."""

    engine: Annotated[
        Literal["simulator", "sglang", "vllm"], Meta(description="which engine serves the model")
    ]
    name: Annotated[Name | None, Meta(description="defaults to the model's name")] = None
    replicas: Annotated[
        int, Meta(ge=0, le=4096, description="engine processes to keep running")
    ] = 1
    model_path: Annotated[str | None, Meta(description="local folder or hub id of the weights")] = (
        None
    )
    args: Annotated[
        tuple[str, ...], Meta(description="further command-line arguments of the engine")
    ] = ()
    env: Annotated[dict[str, str], Meta(description="further environment of the engine")] = (
        msgspec.field(default_factory=dict)
    )
    gpus: Annotated[
        Count | None,
        Meta(description="GPUs of each replica (default: what its arguments ask for)"),
    ] = None
    adapters: Annotated[
        dict[Name, Path],
        Meta(description="LoRA adapters to load: name to local folder or hub id"),
    ] = msgspec.field(default_factory=dict)
    sleep: Annotated[
        bool, Meta(description="start engines so that `doherty sleep` can free their GPU memory")
    ] = False
    target_inputs: Annotated[
        Count, Meta(description="requests in flight per replica to aim at; 0: none")
    ] = 0
    max_inputs: Annotated[
        Count,
        Meta(description="requests in flight on a replica that no proxy worker exceeds; 0: any"),
    ] = 0
    weight: Annotated[
        float, Meta(ge=0.01, le=10.0, description="share of conversations of each of its replicas")
    ] = 1.0
    start_timeout_secs: Annotated[Seconds, Meta(description="time from start to ready")] = 900.0
    stop_grace_secs: Annotated[
        Seconds, Meta(description="time to drain, and again from SIGTERM to SIGKILL")
    ] = 30.0


class ModelConfig(Section, frozen=True, kw_only=True):
    """One model name that clients ask for."""

    name: Name
    pools: Annotated[tuple[PoolConfig, ...], Meta(min_length=1)]


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    region: Name = "local"
    proxy: ProxyConfig = ProxyConfig()
    manager: ManagerConfig = ManagerConfig()
    models: tuple[ModelConfig, ...] = ()


class ConfigError(Exception):
    """The configuration cannot be used; the text says where and what to do."""


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
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_config(text, path)


def parse_config(text: str, source: str) -> Config:
    """Return the configuration in `text`; `source` names it in errors. Raises `ConfigError`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        repeated = repeated_key(node) if node is not None else None
        if repeated is not None:
            raise ConfigError(f"{source}:{repeated[0]}: '{repeated[1]}' is given twice")
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply, or an anchor holds itself") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors of tagged values check little.
        raise ConfigError(
            f"{source}: a date, number or tag cannot be read ({error}); put text in quotes"
        ) from error
    if value is None:
        return Config()
    if isinstance(value, dict) and isinstance(value.get("proxy"), dict):
        _respell(value["proxy"])
    try:
        config = msgspec.convert(value, Config)
    except msgspec.ValidationError as error:
        line, text = explain(str(error), node, Config)
        raise ConfigError(f"{source}:{line}: {text}") from error
    _check_names(config, source)
    return config


def _respell(proxy: dict[Any, Any]) -> None:
    """Take what people write for what they mean."""
    policy = proxy.get("policy")
    if isinstance(policy, str):
        proxy["policy"] = POLICY_ALIASES.get(policy, policy)
    for name in ("access_log", "kv_events", "tls_client_auth"):
        if proxy.get(name) is False:  # YAML 1.1 reads a bare off so
            proxy[name] = "off"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, for editors."""
    return msgspec.json.schema(Config)


def describe_fields(section: type[Section]) -> Iterator[tuple[str, Any, str]]:
    """Yield name, bare type and description of each field, in order; flags are made of these."""
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        annotation = hints[field.name]
        metas = [a for a in get_args(annotation) if isinstance(a, Meta) and a.description]
        bare = get_type_hints(section)[field.name]
        yield field.name, bare, metas[-1].description or "" if metas else ""


def override(base: ProxyConfig, values: Mapping[str, Any], source: str) -> ProxyConfig:
    """Return `base` with `values` (from flags or the environment) laid over it, checked."""
    merged = {name: getattr(base, name) for name in base.__struct_fields__} | dict(values)
    merged["policy"] = POLICY_ALIASES.get(merged["policy"], merged["policy"])
    try:
        return msgspec.convert(merged, ProxyConfig, strict=False)
    except msgspec.ValidationError as error:
        match = re.search(r"at `\$\.(\w+)", str(error))
        key = match[1] if match else ""
        problem = str(error).split(" - at ")[0]
        raise ConfigError(
            f"{source.format(flag=key.replace('_', '-'), env=key.upper())}: {problem}"
        ) from error


def _check_names(config: Config, source: str) -> None:
    seen: set[str] = set()
    for model in config.models:
        if model.name in seen:
            raise ConfigError(
                f"{source}: model '{model.name}' is defined twice; give it several pools instead"
            )
        seen.add(model.name)
        for pool in model.pools:
            if model.name in pool.adapters:
                raise ConfigError(
                    f"{source}: model '{model.name}' has an adapter of the same name; clients "
                    "could not ask for it, so give it another"
                )
            if pool.max_inputs and pool.target_inputs > pool.max_inputs:
                raise ConfigError(
                    f"{source}: model '{model.name}': target_inputs "
                    f"{pool.target_inputs} is above max_inputs {pool.max_inputs}"
                )
