"""`doherty status`: the fleet of a running manager as a table."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from backends.failure import StartError
from backends.scaling_report import ScalingReport
from proxy.contract import (
    FLEET_PATH,
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    ReplicaRecord,
    decode_snapshot,
)

TIMEOUT_S = 5.0
HEADINGS = (
    "ID",
    "STATE",
    "ENGINE",
    "URL",
    "GPUS",
    "RUNNING",
    "WAITING",
    "KV",
    "RESTARTS",
    "REASON",
)


def fetch_fleet(manager_url: str) -> FleetSnapshot:
    """Ask the manager. Raises `StartError` saying what to do."""
    check_manager_url(manager_url)
    url = manager_url.rstrip("/") + FLEET_PATH
    try:
        with open_url(url) as response:
            return decode_snapshot(response.read(SNAPSHOT_BYTES_MAX + 1))
    except urllib.error.HTTPError as error:
        error.close()
        raise StartError(f"{url} answered {error.code}: is that a manager?") from error
    except msgspec.MsgspecError as error:
        raise StartError(f"{url} answered something else than a fleet: {error}") from error
    except (OSError, ValueError) as error:
        raise no_manager(manager_url, error) from error


def check_manager_url(manager_url: str) -> None:
    """Raise `StartError` for what cannot be asked."""
    if urlsplit(manager_url).scheme not in {"http", "https"}:
        raise StartError(f"'{manager_url}' is no manager's address, such as http://127.0.0.1:8002")


def open_url(what: str | urllib.request.Request) -> Any:
    """Ask a manager: it is on this machine or near, never behind the user's web proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(what, timeout=TIMEOUT_S)


def no_manager(manager_url: str, error: Exception) -> StartError:
    """Return what to say when nobody answered."""
    reason = getattr(error, "reason", None) or error
    return StartError(f"no manager answers on {manager_url} ({reason}); name it with --manager-url")


def table(fleet: FleetSnapshot, scaling: ScalingReport | None = None) -> str:
    """Return one line for each replica and engine worker, and one for each pool that waits.

    `scaling` tells how deep those at rest are, and who waits for GPUs.
    """
    pools = scaling.pools if scaling else ()
    resting = {name: rung for pool in pools for name, rung in pool.resting.items()}
    there = (*fleet.replicas, *fleet.workers)
    rows = [HEADINGS, *(_row(replica, resting) for replica in there)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines = lines if there else ["no replicas"]
    lines += [f"{pool.pool} waits: {pool.waiting}" for pool in pools if pool.waiting]
    return "\n".join(lines)


def _row(replica: ReplicaRecord, resting: Mapping[str, str]) -> tuple[str, ...]:
    load = replica.load
    state = "asleep" if replica.asleep else replica.state.value
    return (
        replica.replica_id,
        resting.get(replica.replica_id, state),
        f"{replica.engine} {replica.engine_version}".rstrip(),
        replica.url,
        ",".join(replica.gpus) or "-",
        str(load.running) if load else "-",
        str(load.waiting) if load else "-",
        f"{load.kv_used_ratio:.0%}" if load else "-",
        str(replica.restarts),
        replica.reason,
    )
