"""The part of the configuration that says where engines run, and how long their machine stays."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from proxy.config_reading import Path, PositiveInt, Section

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
