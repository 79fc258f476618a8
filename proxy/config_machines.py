"""The part of the configuration that says where engines run, and how long their machine stays."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from proxy.config_reading import Count, Name, Path, PositiveInt, Section

Engine = Literal["simulator", "sglang", "vllm"]
NoticeKind = Literal["aws", "gcp", "azure", "file"]

_User = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]+(:[A-Za-z0-9_.-]+)?$")]
_Mount = Annotated[str, Meta(pattern=r"^/[^:]*(:/[^:]*)?(:ro|:rw)?$")]


class DockerConfig(Section, frozen=True, kw_only=True):
    """Engines as containers of the Docker engine on this machine."""

    url: Annotated[
        str,
        Meta(pattern=r"^unix:///.+", description="socket of the Docker engine on this machine"),
    ] = "unix:///var/run/docker.sock"
    images: Annotated[
        dict[Engine, Path], Meta(description="image of each engine; a pool may name its own")
    ] = msgspec.field(default_factory=dict)
    pull: Annotated[
        Literal["never", "missing"], Meta(description="whether an image that is not here is got")
    ] = "never"
    shm_mib: Annotated[PositiveInt, Meta(description="size of /dev/shm in each container")] = 16384
    user: Annotated[
        _User | None,
        Meta(description="user, or user:group, in the container (default: as the image says)"),
    ] = None
    mounts: Annotated[
        tuple[_Mount, ...],
        Meta(
            description="folders that containers see beside those of the command: PATH, PATH:ro or "
            "PATH:INSIDE:ro"
        ),
    ] = ()
    cache_dir: Annotated[
        Path | None,
        Meta(description="what engines compile and fetch (default: cache in run_dir)"),
    ] = None


_EnginePort = Annotated[int, Meta(ge=1024, le=65535)]


class RayConfig(Section, frozen=True, kw_only=True):
    """Engines as actors of a Ray cluster, on whichever of its nodes has room."""

    address: Annotated[
        str,
        Meta(
            pattern=r"^(local|auto|ray://[^/\s]+:\d+|[^/\s]+:\d+)$",
            description="local (a cluster of this machine, which the manager starts and ends), "
            "auto (the one that this machine is a node of), HOST:PORT of its head as a node has "
            "it, or ray://HOST:PORT from elsewhere",
        ),
    ] = "local"
    namespace: Annotated[
        Name | None,
        Meta(
            description="of this manager's engines alone: those in it that it does not know are "
            "ended (default: doherty-REGION)"
        ),
    ] = None
    auth: Annotated[
        Literal["disabled", "token"],
        Meta(description="token: what RAY_AUTH_TOKEN of the manager's environment says"),
    ] = "disabled"
    port_min: Annotated[
        _EnginePort, Meta(description="first of the ports that engines get on their nodes")
    ] = 20_000
    port_max: Annotated[
        _EnginePort,
        Meta(description="last of them; Ray's own workers must have others"),
    ] = 29_999
    env: Annotated[
        dict[str, str], Meta(description="environment of every engine, over that of its node")
    ] = msgspec.field(default_factory=dict)
    versions: Annotated[
        dict[Engine, Path],
        Meta(description="release of each engine on the nodes, by which its flags are judged"),
    ] = msgspec.field(default_factory=dict)
    runtime_env: Annotated[
        dict[str, Any], Meta(description="Ray's runtime_env of each actor, such as an image_uri")
    ] = msgspec.field(default_factory=dict)
    local_gpus: Annotated[
        Count | None, Meta(description="GPUs of a local cluster (default: those that Ray finds)")
    ] = None

    def __post_init__(self) -> None:
        """Refuse a range without ports."""
        if self.port_max < self.port_min:
            raise ValueError(f"port_max {self.port_max} is below port_min {self.port_min}")


class ReclaimNoticeConfig(Section, frozen=True, kw_only=True):
    """Where a cloud says that this machine will be taken away."""

    kind: Annotated[NoticeKind, Meta(description="whose words are to be understood")]
    source: Annotated[
        Path | None,
        Meta(description="URL or file to look at (default: the cloud's own; file: required)"),
    ] = None
    poll_secs: Annotated[float, Meta(ge=0.1, le=60, description="pause between looks at it")] = 2.0

    def __post_init__(self) -> None:
        """Refuse a file without its path."""
        if self.kind == "file" and self.source is None:
            raise ValueError("kind file needs a source: the path of the file that will appear")
