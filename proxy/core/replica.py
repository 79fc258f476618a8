"""One replica as the data path sees it: an immutable snapshot, replaced as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from proxy.contract import LoadSample, ReplicaRecord, ReplicaState

_URL: Final = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?)(?::([0-9]{1,5}))?/?"
)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One engine server. `suspect` is this worker's own finding; `state` is the manager's."""

    replica_id: str
    host: str
    port: int
    tls: bool
    host_field: bytes  # `Host: authority` with its line end, ready to send
    models: frozenset[str]  # empty: not known, so any
    pool: str
    region: str
    engine: str
    state: ReplicaState
    max_inputs: int
    kv_capacity_tokens: int
    restarts: int
    suspect: bool = False
    adapters: frozenset[str] | None = None  # LoRA adapters that are loaded; None: not known
    load: LoadSample | None = None

    @property
    def name(self) -> str:
        """What the ring and the tables know it by."""
        return self.replica_id

    @property
    def available(self) -> bool:
        """May take new requests."""
        return self.state is ReplicaState.READY and not self.suspect


def parse_url(url: str) -> tuple[bool, str, int]:
    """Return (tls, host, port). Raises `ValueError` with a message for the operator."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(
            f"replica URL {url!r} must look like http://host:port, without path, query or user"
        )
    tls = match[1] == "https"
    port = int(match[3]) if match[3] else (443 if tls else 80)
    if not 0 < port < 65536:
        raise ValueError(f"replica URL {url!r}: port {port} is not between 1 and 65535")
    return tls, match[2].strip("[]"), port


def replica_of(record: ReplicaRecord) -> Replica:
    """Return the replica that a record describes. Raises `ValueError` on a bad URL."""
    tls, host, port = parse_url(record.url)
    shown = f"[{host}]" if ":" in host else host
    return Replica(
        replica_id=record.replica_id,
        host=host,
        port=port,
        tls=tls,
        host_field=f"host: {shown}:{port}\r\n".encode(),
        models=frozenset(record.models),
        pool=record.pool,
        region=record.region,
        engine=record.engine,
        state=record.state,
        max_inputs=record.max_inputs,
        kv_capacity_tokens=record.load.kv_capacity_tokens if record.load else 0,
        restarts=record.restarts,
        load=record.load,
    )
