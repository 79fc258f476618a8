"""What a request can be sent to, as the data path sees it: an immutable value, replaced as a whole.

An engine server with several data-parallel ranks has a KV cache and a queue in each of them, and
takes a request to the rank that a header names. So each rank is a replica here, chosen for itself
by its `name`. What happens to a server (a refused connection, a probe, a restart) happens to all of
its ranks; that and its connections go by `replica_id`.

A proxy of another region takes the place of a replica, too, once for each model that it has: its
name is then `replica_id/model`, and what it can take is in `core.outlook`, not in its load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from msgspec import structs

from proxy.contract import (
    DP_SIZE_MAX,
    WEIGHT_MAX,
    WEIGHT_MIN,
    Figures,
    LoadSample,
    ReplicaRecord,
    ReplicaState,
)
from proxy.core.classes import NAMES

RANK_FIELD: Final = b"x-data-parallel-rank"  # both engines read it
RID_FIELD: Final = b"x-override-rid"  # SGLang's

_NUMBER_FIELD: Final = re.compile(r"x-[a-z-]{1,60}: -?[0-9]{1,9}")
_URL: Final = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?)(?::([0-9]{1,5}))?/?"
)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One engine server, or one rank of it.

    `suspect` is this worker's own finding; `state` is the manager's.
    """

    name: str  # `replica_id`, or of one rank `replica_id/rank`
    replica_id: str  # of the server
    dp_rank: int | None  # None: the server has but one, or says nothing of them
    host: str
    port: int
    tls: bool
    host_field: bytes  # `Host: authority` with its line end, ready to send; then that of its rank
    models: frozenset[str]  # empty: not known, so any
    adapters: frozenset[str] | None  # LoRA adapters that it has loaded; None: not known
    pool: str
    region: str
    engine: str
    state: ReplicaState
    max_inputs: int
    max_tokens: int  # uncached prompt tokens queued there that it may never exceed; 0: any
    kv_capacity_tokens: int
    weight: float
    load: LoadSample | None  # its own, without `ranks`
    restarts: int
    asleep: bool
    rid_header: bool = False  # it takes a chat request's id from `RID_FIELD`
    priority_fields: tuple[bytes, ...] = ()  # by class, each with its line end; empty: none
    suspect: bool = False
    remote: bool = False  # a proxy of another region, which chooses among its replicas itself

    @property
    def available(self) -> bool:
        """May take new requests."""
        return self.serves and not self.suspect

    @property
    def serves(self) -> bool:
        """The manager says that it is up and awake."""
        return self.state is ReplicaState.READY and not self.asleep


def parse_url(url: str, what: str = "replica URL") -> tuple[bool, str, int]:
    """Return (tls, host, port). Raises `ValueError` with a message for the operator."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(
            f"{what} {url!r} must look like http://host:port, without path, query or user"
        )
    tls = match[1] == "https"
    port = int(match[3]) if match[3] else (443 if tls else 80)
    if not 0 < port < 65536:
        raise ValueError(f"{what} {url!r}: port {port} is not between 1 and 65535")
    return tls, match[2].strip("[]"), port


def replica_of(record: ReplicaRecord, max_tokens: int = 0) -> Replica:
    """Return the server that a record describes, as a whole; `max_tokens` is its pool's limit.

    Raises `ValueError` on a URL or a weight that nothing can be done with.
    """
    tls, host, port = parse_url(record.url)
    if not WEIGHT_MIN <= record.weight <= WEIGHT_MAX:  # so not a number, either
        raise ValueError(f"weight {record.weight} is not between {WEIGHT_MIN} and {WEIGHT_MAX:g}")
    shown = f"[{host}]" if ":" in host else host
    return Replica(
        name=record.replica_id,
        replica_id=record.replica_id,
        dp_rank=None,
        host=host,
        port=port,
        tls=tls,
        host_field=f"host: {shown}:{port}\r\n".encode(),
        models=frozenset(record.models),
        adapters=None if record.adapters is None else frozenset(record.adapters),
        pool=record.pool,
        region=record.region,
        engine=record.engine,
        state=record.state,
        max_inputs=record.max_inputs,
        max_tokens=max_tokens,
        kv_capacity_tokens=record.load.kv_capacity_tokens if record.load else 0,
        weight=record.weight,
        load=record.load,
        restarts=record.restarts,
        asleep=record.asleep,
        rid_header=record.rid_header,
        priority_fields=_fields(record.priority_fields),
    )


def remote_replica(name: str, region: str, url: str, model: str) -> Replica:
    """Return a proxy of another region as what a request for this model can be sent to.

    Raises `ValueError` on a URL that nothing can be done with.
    """
    record = ReplicaRecord(
        replica_id=name, url=url, models=(model,), pool=name, region=region, engine="proxy"
    )
    return replace(replica_of(record), name=f"{name}/{model}", remote=True)


def _fields(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return fields as they are sent; none of what is not plainly a name and a number a class."""
    if len(texts) != len(NAMES) or not all(_NUMBER_FIELD.fullmatch(text) for text in texts):
        return ()
    return tuple([text.encode() + b"\r\n" for text in texts])


def replicas_of(record: ReplicaRecord, max_tokens: int = 0) -> list[Replica]:
    """Return what of a record's server can be chosen: it, or its ranks. Raises as `replica_of`."""
    server, names = replica_of(record, max_tokens), names_of(record)
    if len(names) < 2:
        return [server]
    return [_rank(server, name, rank, len(names)) for rank, name in enumerate(names)]


def names_of(record: ReplicaRecord) -> list[str]:
    """Return the names of what of a record's server can be chosen."""
    size = min(record.dp_size, DP_SIZE_MAX)
    if size < 2:
        return [record.replica_id]
    return [f"{record.replica_id}/{rank}" for rank in range(size)]


def _rank(server: Replica, name: str, rank: int, size: int) -> Replica:
    """Return one rank: its own figures where the engine tells them, else an even share."""
    whole = server.load
    own = whole.ranks[rank] if whole is not None and rank < len(whole.ranks) else None
    load = None
    if whole is not None and own is not None:
        figures = {field: getattr(own, field) for field in Figures.__struct_fields__}
        load = structs.replace(whole, ranks=(), **figures)
    capacity_tokens = own.kv_capacity_tokens if own is not None else 0
    return replace(
        server,
        name=name,
        dp_rank=rank,
        host_field=b"%b%b: %d\r\n" % (server.host_field, RANK_FIELD, rank),
        # The limits are the server's; in whole ones, and none at all would mean no limit.
        max_inputs=-(-server.max_inputs // size),
        max_tokens=-(-server.max_tokens // size),
        kv_capacity_tokens=capacity_tokens or server.kv_capacity_tokens // size,
        load=load,
    )
