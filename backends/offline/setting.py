"""What one service runs with: where it keeps jobs, whom it listens to, what workers cost."""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path

import msgspec

from backends.offline.records import Limits
from proxy.config import Config, ModelConfig, OfflineConfig, ProxyConfig

STORE_NAME = "offline.db"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of a run, and where the others are."""

    config: Config
    config_path: str | None
    manager_url: str | None
    proxy_url: str | None

    @property
    def store(self) -> str:
        """Return where jobs are kept: a file in the run folder, where nothing else is said."""
        return self.config.offline.store or str(Path(self.config.manager.run_dir) / STORE_NAME)

    @property
    def limits(self) -> Limits:
        offline = self.config.offline
        return Limits(
            hold_s=offline.hold_secs,
            chunk_lines=offline.chunk_lines,
            keep_s=offline.keep_secs,
            bytes_max=offline.store_bytes_max,
        )


def exposed(offline: OfflineConfig) -> str | None:
    """Say what is wrong with where the service listens; None: nothing.

    A desk that others can reach gives lines of all tenants to whoever asks.
    """
    if offline.work_key is not None or offline.host == "localhost":
        return None
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(offline.host).is_loopback:
            return None
    return (
        f"offline.host {offline.host} can be reached from other machines, whose processes could "
        "take everybody's lines; set offline.work_key (or DOHERTY_WORK_KEY)"
    )


def locked_out(offline: OfflineConfig, proxy: ProxyConfig) -> str | None:
    """Say why no lines can be sent to replicas through this proxy; None: they can, or are not to.

    Lines go to the proxy as anybody's requests do, and by no certificate: each would fail.
    """
    if not offline.enabled or not offline.spare_capacity or proxy.tls_client_auth != "required":
        return None
    return (
        "proxy.tls_client_auth: required: lines of batches have no client certificate and are not "
        "sent to replicas; only engine workers (serves: jobs) do them. Make it optional, or set "
        "offline.spare_capacity: false if that is meant"
    )


def unreadable(store: str | None) -> str | None:
    """Say what is wrong with where jobs are to be kept; None: nothing."""
    scheme, is_url, _ = (store or "").partition("://")
    if not is_url or scheme in {"postgresql", "postgres"}:
        return None
    return f"offline.store: {scheme}:// is none; it is a SQLite file or postgresql://"


def prices_of(models: tuple[ModelConfig, ...]) -> dict[str, float]:
    """Return the price of a GPU-hour by model: the highest of those pools that do jobs."""
    prices: dict[str, float] = {}
    for model in models:
        known = [
            pool.gpu_price_per_hour
            for pool in model.pools
            if pool.gpu_price_per_hour is not None and pool.serves == "jobs"
        ]
        if known:
            prices[model.name] = max(known)
    return prices
