"""The part of the configuration that says how the manager of a region runs engines."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from proxy.config_machines import DockerConfig, RayConfig, ReclaimNoticeConfig
from proxy.config_reading import Count, Path, Port, PositiveInt, Seconds, Section

_CARD = r"(\d{1,3}(-\d{1,3})?|(GPU|MIG)-[A-Za-z0-9/-]+)"
_CARDS = re.compile(rf"auto|none|{_CARD}(, ?{_CARD})*")
_SPAN = re.compile(r"(?<![\w-])(\d+)-(\d+)(?![\w-])")


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
            description="GPUs to lease to replicas: auto (what nvidia-smi lists; of a Ray cluster, "
            "those that nobody else has), none (leave that to engines or the cluster), or a list "
            "such as 0,2-3 (UUIDs and MIG instances, too)"
        ),
    ] = "auto"
    warm_page_cache: Annotated[
        bool, Meta(description="read weights and compile caches into memory beside a start")
    ] = True
    trace_engines: Annotated[
        bool,
        Meta(
            description="have engines send traces to the proxy's otlp_traces_endpoint, where their "
            "environment has OpenTelemetry's exporter"
        ),
    ] = True
    snapshot_dir: Annotated[
        Path | None,
        Meta(description="folder for images of warm replicas (default: snapshots in run_dir)"),
    ] = None
    snapshot_bytes_max: Annotated[
        PositiveInt, Meta(description="disk space that these may take; the oldest go first")
    ] = 200 * 1024**3
    provider: Annotated[
        Literal["process", "docker", "ray"], Meta(description="what engines are started as")
    ] = "process"
    docker: Annotated[
        DockerConfig, Meta(description="with provider docker: how containers are made")
    ] = DockerConfig()
    ray: Annotated[
        RayConfig, Meta(description="with provider ray: the cluster, and what engines get there")
    ] = RayConfig()
    reclaim_notice: Annotated[
        ReclaimNoticeConfig | None,
        Meta(description="where a cloud says that this machine will be taken away"),
    ] = None
    keys_path: Annotated[
        Path | None,
        Meta(description="file of API keys to tell proxies of (default: the proxy's keys_path)"),
    ] = None
    keys_follow: Annotated[
        str | None,
        Meta(description="manager of another region, whose API keys are taken and told on"),
    ] = None

    keys_listen: Annotated[
        Path | None,
        Meta(
            description="HOST:PORT where managers of other regions follow the keys of this one, "
            "with proxy.peer_key and by the proxy's certificate"
        ),
    ] = None

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
        if self.keys_path is not None and self.keys_follow is not None:
            raise ValueError(
                "keys_path and keys_follow exclude each other: keys are kept here or elsewhere"
            )
        if self.provider == "ray" and self.cards not in {"auto", "none"}:
            raise ValueError(
                "gpus: a list names cards of this machine; with provider ray say auto or none"
            )
