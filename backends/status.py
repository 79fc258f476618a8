"""`doherty status`: the fleet of a running manager as a table."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import urlsplit

import msgspec

from backends.failure import StartError
from proxy.contract import (
    FLEET_PATH,
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    ReplicaRecord,
    decode_snapshot,
)

TIMEOUT_S = 5.0
HEADINGS = ("ID", "STATE", "URL", "RUNNING", "WAITING", "KV", "RESTARTS", "REASON")


def fetch_fleet(manager_url: str) -> FleetSnapshot:
    """Ask the manager. Raises `StartError` saying what to do."""
    if urlsplit(manager_url).scheme not in {"http", "https"}:
        raise StartError(f"'{manager_url}' is no manager's address, such as http://127.0.0.1:8002")
    url = manager_url.rstrip("/") + FLEET_PATH
    # A manager is on this machine or in its private network, never behind the user's web proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            return decode_snapshot(response.read(SNAPSHOT_BYTES_MAX + 1))
    except urllib.error.HTTPError as error:
        error.close()
        raise StartError(f"{url} answered {error.code}: is that a manager?") from error
    except msgspec.MsgspecError as error:
        raise StartError(f"{url} answered something else than a fleet: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise StartError(
            f"no manager answers on {manager_url} ({reason}); name it with --manager-url"
        ) from error


def table(fleet: FleetSnapshot) -> str:
    """Return one line for each replica under headings."""
    rows = [HEADINGS, *(_row(replica) for replica in fleet.replicas)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines) if fleet.replicas else "no replicas"


def _row(replica: ReplicaRecord) -> tuple[str, ...]:
    load = replica.load
    return (
        replica.replica_id,
        replica.state.value,
        replica.url,
        str(load.running) if load else "-",
        str(load.waiting) if load else "-",
        f"{load.kv_used_ratio:.0%}" if load else "-",
        str(replica.restarts),
        replica.reason,
    )
