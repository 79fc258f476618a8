"""What routers tell each other: their decisions.

One picture in many processes needs few facts: what was sent where, when its prefill ended, when it
was over; what an engine has evicted; and now and then all that is still open, so that whatever was
lost on the way does no lasting harm. A replica is named by a hash, the same everywhere, and who
does not know the name skips the note.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from xxhash import xxh3_64_intdigest

from proxy.core.usage import Usage

IDS: Final = 1 << 32  # lease ids count around


class OpenLease:
    """A lease that its owner holds: what it weighs, and on whom."""

    __slots__ = (
        "cached_tokens",
        "lease_id",
        "prefill_ended",
        "prefill_tokens",
        "prompt_bytes",
        "replica_key",
        "stream",
        "weight",
        "yields",
    )

    def __init__(
        self,
        lease_id: int,
        replica_key: int,
        prefill_tokens: int,
        cached_tokens: int,
        prompt_bytes: int,
        *,
        stream: bool,
        weight: float,
        prefill_ended: bool = False,
        yields: bool = False,
    ) -> None:
        self.lease_id = lease_id
        self.replica_key = replica_key
        self.prefill_tokens = prefill_tokens
        self.cached_tokens = cached_tokens
        self.prompt_bytes = prompt_bytes
        self.stream = stream
        self.weight = weight
        self.prefill_ended = prefill_ended
        self.yields = yields  # to online work, as long as it is unanswered


class Note:
    """One of the following."""

    __slots__ = ()


class Dispatched(Note):
    """A request was sent: its lease, and the points of its chain."""

    __slots__ = ("ends", "hashes", "lease")

    def __init__(self, lease: OpenLease, hashes: Sequence[int], ends: Sequence[int]) -> None:
        self.lease = lease
        self.hashes = hashes
        self.ends = ends


class PrefillEnded(Note):
    __slots__ = ("lease_id",)

    def __init__(self, lease_id: int) -> None:
        self.lease_id = lease_id


class Released(Note):
    """A lease is over; `usage` is what the engine counted, if it did."""

    __slots__ = ("lease_id", "usage")

    def __init__(self, lease_id: int, usage: Usage | None) -> None:
        self.lease_id = lease_id
        self.usage = usage


class Evicted(Note):
    """An engine no longer has these."""

    __slots__ = ("hashes", "replica_key")

    def __init__(self, replica_key: int, hashes: Sequence[int]) -> None:
        self.replica_key = replica_key
        self.hashes = hashes


class Cleared(Note):
    """An engine's cache is empty."""

    __slots__ = ("replica_key",)

    def __init__(self, replica_key: int) -> None:
        self.replica_key = replica_key


class State(Note):
    """What an engine says of itself; negative where it does not.

    `fresh`: its events are heard, so that what it has is known and not believed.
    """

    __slots__ = ("fresh", "kv_used_ratio", "replica_key", "resident_tokens", "waiting_tokens")

    def __init__(
        self,
        replica_key: int,
        fresh: bool,
        resident_tokens: int,
        waiting_tokens: int,
        kv_used_ratio: float,
    ) -> None:
        self.replica_key = replica_key
        self.fresh = fresh
        self.resident_tokens = resident_tokens
        self.waiting_tokens = waiting_tokens
        self.kv_used_ratio = kv_used_ratio


class Response(Note):
    """A stored response lies with a replica."""

    __slots__ = ("replica_key", "response_key")

    def __init__(self, response_key: int, replica_key: int) -> None:
        self.response_key = response_key
        self.replica_key = replica_key


class OpenLeases(Note):
    """All that is open among the `span` lease ids from `first` on, counted around."""

    __slots__ = ("first", "leases", "span")

    def __init__(self, first: int, span: int, leases: list[OpenLease]) -> None:
        self.first = first
        self.span = span
        self.leases = leases

    def covers(self, lease_id: int) -> bool:
        return (lease_id - self.first) % IDS < self.span


class Holds(Note):
    """A replica is believed to have these, the least recent first; with the octets of each."""

    __slots__ = ("hashes", "replica_key", "sizes")

    def __init__(self, replica_key: int, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        self.replica_key = replica_key
        self.hashes = hashes
        self.sizes = sizes


def replica_key(name: str) -> int:
    """Return what a replica is called in notes."""
    return xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
