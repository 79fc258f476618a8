"""Where Prometheus finds the engines' own metrics: its HTTP service discovery.

One group for each engine process that can answer, with what our own metrics call it as labels, so
that panels can set an engine's figures beside the proxy's. Addresses are those by which the manager
reaches its engines. (Prometheus, "HTTP SD": a JSON list of `targets` and `labels`, all texts.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from proxy.contract import ReplicaRecord, ReplicaState

TARGETS_PATH: Final = "/v1/prometheus/targets"
_ANSWERS: Final = (ReplicaState.READY, ReplicaState.DRAINING)
_PORTS: Final = {"http": 80, "https": 443}


def groups_of(records: Iterable[ReplicaRecord]) -> list[dict[str, object]]:
    """Return the groups, one for each that is awake."""
    return [_group(each) for each in records if each.state in _ANSWERS and not each.asleep]


def _group(record: ReplicaRecord) -> dict[str, object]:
    url = urlsplit(record.url)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    labels = {
        "__scheme__": url.scheme,
        "replica": record.replica_id,
        "pool": record.pool,
        "region": record.region,
        "engine": record.engine,
        "served_model": record.models[0] if record.models else "",
    }
    return {"targets": [f"{host}:{url.port or _PORTS[url.scheme]}"], "labels": labels}
