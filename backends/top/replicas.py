"""The replicas as a table, in the order and of the kind that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from backends.top import words
from backends.top.table import Cell, Column, Row, Table, Tone, cell
from proxy.contract.view import ProxyView, ReplicaView

BAR_WIDTH = 8
KV_BUSY, KV_FULL = 0.8, 0.95  # an engine that has no blocks left begins to evict and to preempt
WAIT_BUSY_S, WAIT_LONG_S = 0.4, 5.0  # the Doherty threshold; what nobody waits for
_TROUBLE = ("suspect", "backoff")
_AT_REST = ("asleep", "stopped", "held")
_COLUMNS = (
    Column("REPLICA", width_min=12, width_max=28),
    Column("STATE", width_min=8, width_max=12),
    Column("LOAD", width_min=BAR_WIDTH + 1 + 7),
    Column("WAIT", right=True, width_min=6),
    Column("KV", right=True, width_min=4),
    Column("HIT", rank=1, right=True, width_min=4),
    Column("REQ/S", rank=2, right=True, width_min=5),
    Column("RUN", rank=3, right=True, width_min=3),
    Column("QUEUE", rank=3, right=True, width_min=5),
    Column("POOL", rank=4, width_max=24),
    Column("RING", rank=6, right=True, width_min=5),
    Column("DECODE", rank=7, right=True, width_min=6),
    Column("PREFILL/S", rank=8, right=True, width_min=9),
    Column("TOKENS", rank=9, right=True, width_min=6),
    Column("CACHE BY", rank=10),
    Column("STARTS", rank=11, right=True),
    Column("ENGINE", rank=12, width_max=20),
    Column("REASON", rank=5, width_max=60),
)


class Order(NamedTuple):
    """An order of the replicas; the first is what somebody looks for who asks for it."""

    name: str
    key: Callable[[ReplicaView], tuple[object, ...]]


def _down(value: float | None) -> float:
    """Return a key by which the greatest comes first, and what nobody knows last."""
    return 1.0 if value is None else -value


def load_of(replica: ReplicaView) -> float | None:
    """Return what is in flight, of 1 where there is a limit; None where there is none."""
    return replica.inflight / replica.inflight_max if replica.inflight_max else None


ORDERS = (
    Order("name", lambda r: (r.pool, r.replica_id)),
    Order("load", lambda r: (-r.inflight, r.replica_id)),
    Order("wait", lambda r: (-r.wait_s, r.replica_id)),
    Order("KV", lambda r: (_down(r.kv_used_ratio), r.replica_id)),
    Order("hits", lambda r: (_down(r.cached_ratio), r.replica_id)),
    Order("requests", lambda r: (-r.requests_per_s, r.replica_id)),
    Order("state", lambda r: (_tone_rank(r), state_of(r), r.replica_id)),
)


def arranged(
    replicas: Iterable[ReplicaView], order: int, *, backwards: bool = False
) -> list[ReplicaView]:
    return sorted(replicas, key=ORDERS[order].key, reverse=backwards)


def state_of(replica: ReplicaView) -> str:
    """Return the one word that matters most: what the workers see, then what its manager says."""
    if replica.suspect:
        return "suspect"
    return "held" if replica.held else replica.state


def tone_of(replica: ReplicaView) -> Tone:
    state = state_of(replica)
    if state in _TROUBLE:
        return Tone.BAD
    if state == "ready":
        return Tone.GOOD
    return Tone.FAINT if state in _AT_REST else Tone.BUSY


def states_line(replicas: Sequence[ReplicaView]) -> list[Cell]:
    """Return how many there are in each state, those that serve first."""
    if not replicas:
        return [Cell("no replicas", Tone.BAD)]
    found = Counter((_tone_rank(r) != 2, state_of(r), tone_of(r)) for r in replicas)
    parts = [Cell(f"{len(replicas)} replicas:")]
    for (_, state, tone), number in sorted(found.items(), key=lambda item: item[0][:2]):
        parts.append(cell(f"{number} {state}", tone))
    return parts


def replicas_table(replicas: Iterable[ReplicaView], *, ascii_only: bool = False) -> Table:
    """Return one row for each, in the order that they come."""
    rows = tuple(
        Row(replica.replica_id, _cells(replica, ascii_only=ascii_only)) for replica in replicas
    )
    return Table("replicas", _COLUMNS, rows, "no replicas: none was named, or none has come yet")


def details(replica: ReplicaView, proxy: ProxyView) -> list[tuple[str, str]]:
    """Return all that is known of a replica, named."""
    per_s = words.rate(replica.requests_per_s)
    source = replica.cache_source
    if replica.cache_source_age_s is not None:
        source += f", heard {words.age(replica.cache_source_age_s)} ago"
    limit = f" of {replica.inflight_max}" if replica.inflight_max else ", no limit"
    listed = [
        ("state", f"{state_of(replica)} ({replica.state} by its manager)"),
        ("reason", replica.reason or words.UNKNOWN),
        ("pool", replica.pool),
        ("region", replica.region + (", this one" if replica.region == proxy.region else "")),
        ("engine", f"{replica.engine} {replica.engine_version}".rstrip()),
        ("models", ", ".join(replica.models) or words.UNKNOWN),
        ("GPUs", ", ".join(replica.gpus) or words.UNKNOWN),
        ("ranks", str(replica.dp_size)),
        ("starts again", str(replica.restarts)),
        ("in flight", f"{replica.inflight}{limit}; {per_s} begun a second"),
        ("work that waits", words.seconds(replica.wait_s)),
        ("prefill to do", f"{words.count(replica.queued_tokens)} tokens"),
        ("prefill speed", f"{words.count(replica.prefill_tokens_per_s)} tokens a second"),
        ("decoding", words.rate(replica.decoding)),
        ("by the engine", f"{_known(replica.running)} running, {_known(replica.waiting)} waiting"),
        ("KV cache used", words.ratio(replica.kv_used_ratio)),
        ("prompt tokens cached", words.ratio(replica.cached_ratio)),
        ("KV cache", f"{words.count(replica.cache_tokens)} tokens, judged by {source}"),
        ("share of the ring", words.share(replica.ring_ratio)),
    ]
    return [(name, words.printable(text)) for name, text in listed]


def _cells(replica: ReplicaView, *, ascii_only: bool) -> tuple[Cell, ...]:
    kv = replica.kv_used_ratio
    return (
        cell(replica.replica_id),
        cell(state_of(replica), tone_of(replica)),
        _load(replica, ascii_only=ascii_only),
        Cell(words.seconds(replica.wait_s), _busy(replica.wait_s, WAIT_BUSY_S, WAIT_LONG_S)),
        Cell(words.ratio(kv), _busy(kv, KV_BUSY, KV_FULL)),
        Cell(words.ratio(replica.cached_ratio)),
        Cell(words.rate(replica.requests_per_s)),
        Cell(_known(replica.running)),
        Cell(_known(replica.waiting)),
        cell(replica.pool),
        Cell(words.share(replica.ring_ratio)),
        Cell(words.rate(replica.decoding)),
        Cell(words.count(replica.prefill_tokens_per_s)),
        Cell(words.count(replica.queued_tokens)),
        cell(replica.cache_source),
        Cell(str(replica.restarts), Tone.BUSY if replica.restarts else Tone.PLAIN),
        cell(f"{replica.engine} {replica.engine_version}".rstrip()),
        cell(replica.reason),
    )


def _load(replica: ReplicaView, *, ascii_only: bool) -> Cell:
    load = load_of(replica)
    if load is None:
        return Cell(str(replica.inflight))
    bar = words.bar(load, BAR_WIDTH, ascii_only=ascii_only)
    return Cell(f"{bar} {replica.inflight}/{replica.inflight_max}", _busy(load, 0.8, 1.0))


def _busy(value: float | None, busy: float, full: float) -> Tone:
    if value is None or value < busy:
        return Tone.PLAIN
    return Tone.BUSY if value < full else Tone.BAD


def _known(value: int | None) -> str:
    return words.UNKNOWN if value is None else words.count(value)


def _tone_rank(replica: ReplicaView) -> int:
    return (Tone.BAD, Tone.BUSY, Tone.GOOD, Tone.FAINT).index(tone_of(replica))
