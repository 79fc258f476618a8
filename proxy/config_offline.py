"""The part of the configuration that says how jobs (Files and Batches) are kept and done."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from proxy.config_reading import Key, Path, Port, PositiveInt, Seconds, Section


class OfflineConfig(Section, frozen=True, kw_only=True):
    """Files, batches, and who does their lines."""

    enabled: Annotated[
        bool, Meta(description="whether `doherty up` serves /v1/files and /v1/batches")
    ] = True
    host: Annotated[str, Meta(description="address of the offline service")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port of the offline service")] = 8003
    store: Annotated[
        Path | None,
        Meta(
            description="SQLite file, or postgresql://USER@HOST/DATABASE for several services on "
            "one queue (default: offline.db in run_dir; environment: DOHERTY_STORE)"
        ),
    ] = None
    work_key: Annotated[
        Key | None,
        Meta(description="secret that engine workers present; needed where host is not loopback"),
    ] = None
    work_url: Annotated[
        Path | None,
        Meta(description="URL of this service as engine workers reach it (default: host and port)"),
    ] = None
    file_bytes_max: Annotated[PositiveInt, Meta(description="largest input file, in bytes")] = (
        200 * 1000 * 1000  # OpenAI's limit, as the next one
    )
    lines_max: Annotated[PositiveInt, Meta(description="most lines of a batch")] = 50_000
    keep_secs: Annotated[
        Seconds,
        Meta(description="time after which files that name no expiry go, and ended batches"),
    ] = 30 * 86400.0
    store_bytes_max: Annotated[
        PositiveInt, Meta(description="content of all files and results; more is refused (507)")
    ] = 100 * 1024**3
    hold_secs: Annotated[
        float,
        Meta(ge=1, description="silence of an engine worker after which others get its lines"),
    ] = 60.0
    chunk_lines: Annotated[
        int, Meta(ge=1, le=100_000, description="lines that a worker gets at once")
    ] = 2000
    spare_capacity: Annotated[
        bool,
        Meta(description="send lines to replicas of other classes while these have room"),
    ] = True
    spare_inputs_max: Annotated[
        PositiveInt, Meta(description="such lines in flight on one replica, at most")
    ] = 64
    price_per_hour_max: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="most that engine workers may cost at a time (default: any)"),
    ] = None

    @property
    def desk_url(self) -> str:
        """Return where engine workers find the desk."""
        if self.work_url is not None:
            return self.work_url.rstrip("/")
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{shown}]:{self.port}" if ":" in shown else f"http://{shown}:{self.port}"
