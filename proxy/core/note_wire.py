"""Notes as octets and back: a kind and fixed fields, little-endian; a batch is one after another.

Reading is total. A batch that is broken gives the notes before the fault and `NoteError`: what
follows cannot be known, since the border between two notes is known only from the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct, error
from typing import Final

from proxy.core import limits
from proxy.core.notes import (
    IDS,
    Cleared,
    Dispatched,
    Evicted,
    Holds,
    Note,
    OpenLease,
    OpenLeases,
    PrefillEnded,
    Released,
    Response,
    State,
)
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage

NOTES_VERSION: Final = 1

DISPATCHED: Final = 1
PREFILL_ENDED: Final = 2
RELEASED: Final = 3
EVICTED: Final = 4
CLEARED: Final = 5
STATE: Final = 6
RESPONSE: Final = 7
OPEN_LEASES: Final = 8
HOLDS: Final = 9

_U32_MAX: Final = IDS - 1
_STREAM: Final = 1
_PREFILL_ENDED: Final = 2
_YIELDS: Final = 4  # readers of before it skip it, as every flag that they do not know
_NO_COUNT: Final = _U32_MAX

# kind, flags, lease, replica, prefill, cached and prompt sizes, weight, number of points
_DISPATCHED: Final = Struct("<BBIQIIIfB")
_LEASE: Final = Struct("<BI")
_RELEASED: Final = Struct("<BIIII")
_HASHES: Final = Struct("<BQH")
_REPLICA: Final = Struct("<BQ")
_STATE: Final = Struct("<BBQqqf")
_RESPONSE: Final = Struct("<BQQ")
_OPEN: Final = Struct("<BIIH")
_ENTRY: Final = Struct("<BIQIIIf")
_POINTS: Final = [Struct(f"<{n}Q{n}I") for n in range(limits.NOTE_POINTS_MAX + 1)]


class NoteError(Exception):
    """A batch is broken; `before` are the notes that came before the fault."""

    def __init__(self, text: str, before: list[Note]) -> None:
        super().__init__(text)
        self.before = before


# --- writing ---------------------------------------------------------------------------------


def write_dispatched(lease: OpenLease, chain: PrefixChain, first: int = 0) -> bytes:
    """Tell the points from `first` on. Of too many, the shallowest are told, and the deepest."""
    hashes, ends = chain.hashes, chain.ends
    if first:
        hashes, ends = hashes[first:], ends[first:]
    count = len(hashes)
    if count > limits.NOTE_POINTS_MAX:
        half = limits.NOTE_POINTS_MAX // 2
        hashes, ends = (*hashes[:half], *hashes[-half:]), (*ends[:half], *ends[-half:])
        count = 2 * half
    head = _DISPATCHED.pack(
        DISPATCHED,
        _flags(lease),
        lease.lease_id,
        lease.replica_key,
        _tokens(lease.prefill_tokens),
        _tokens(lease.cached_tokens),
        min(lease.prompt_bytes, _U32_MAX),
        lease.weight,
        count,
    )
    return head + _POINTS[count].pack(*hashes, *ends)


def write_prefill_ended(lease_id: int) -> bytes:
    return _LEASE.pack(PREFILL_ENDED, lease_id)


def write_released(lease_id: int, usage: Usage | None) -> bytes:
    if usage is None:
        return _RELEASED.pack(RELEASED, lease_id, _NO_COUNT, _NO_COUNT, _NO_COUNT)
    cached = usage.cached_tokens
    return _RELEASED.pack(
        RELEASED,
        lease_id,
        _tokens(usage.prompt_tokens),
        _NO_COUNT if cached is None else _tokens(cached),
        _tokens(usage.completion_tokens),
    )


def write_evicted(key: int, hashes: Sequence[int]) -> bytes:
    """Return as many notes as it takes."""
    out = []
    for start in range(0, len(hashes), limits.NOTE_HASHES_MAX):
        part = hashes[start : start + limits.NOTE_HASHES_MAX]
        out.append(_HASHES.pack(EVICTED, key, len(part)) + Struct(f"<{len(part)}Q").pack(*part))
    return b"".join(out)


def write_cleared(key: int) -> bytes:
    return _REPLICA.pack(CLEARED, key)


def write_state(state: State) -> bytes:
    return _STATE.pack(
        STATE,
        1 if state.fresh else 0,
        state.replica_key,
        state.resident_tokens,
        state.waiting_tokens,
        state.kv_used_ratio,
    )


def write_response(response_key: int, key: int) -> bytes:
    return _RESPONSE.pack(RESPONSE, response_key, key)


def write_holds(key: int, hashes: Sequence[int], sizes: Sequence[int]) -> bytes:
    """Return one note; its writer keeps to `NOTE_HASHES_MAX`."""
    count = len(hashes)
    body = Struct(f"<{count}Q{count}I").pack(*hashes, *[min(size, _U32_MAX) for size in sizes])
    return _HASHES.pack(HOLDS, key, count) + body


def write_open_leases(leases: Iterable[OpenLease], next_id: int) -> list[bytes]:
    """Return notes that say together: these are open, and no others of half the ids before.

    `leases` come in the order in which they were opened, and `next_id` was given to none of them.
    Each note stands alone, so that one that is lost takes nothing from the others.
    """
    out: list[bytes] = []
    first = (next_id - IDS // 2) % IDS
    part: list[OpenLease] = []
    for lease in leases:
        if len(part) == limits.NOTE_LEASES_MAX:
            out.append(_write_open(first, lease.lease_id, part))
            first, part = lease.lease_id, []
        part.append(lease)
    out.append(_write_open(first, next_id, part))
    return out


def _write_open(first: int, end: int, leases: list[OpenLease]) -> bytes:
    entries = [
        _ENTRY.pack(
            _flags(lease),
            lease.lease_id,
            lease.replica_key,
            _tokens(lease.prefill_tokens),
            _tokens(lease.cached_tokens),
            min(lease.prompt_bytes, _U32_MAX),
            lease.weight,
        )
        for lease in leases
    ]
    return _OPEN.pack(OPEN_LEASES, first, (end - first) % IDS, len(leases)) + b"".join(entries)


def _flags(lease: OpenLease) -> int:
    flags = (_STREAM if lease.stream else 0) | (_PREFILL_ENDED if lease.prefill_ended else 0)
    return flags | _YIELDS if lease.yields else flags


def _tokens(count: int) -> int:
    return min(max(count, 0), limits.NOTE_TOKENS_MAX)


# --- reading ---------------------------------------------------------------------------------


def read_notes(batch: bytes) -> list[Note]:
    """Return the notes of a batch. Raises `NoteError`, and nothing else, whatever the octets."""
    reader = _Reader(batch)
    found: list[Note] = []
    try:
        while reader.at < len(batch):
            found.append(reader.note())
    except (ValueError, error) as fault:
        raise NoteError(f"octet {reader.at} of {len(batch)}: {fault}", found) from fault
    return found


class _Reader:
    """Reads at `at`, which moves on when a note was read whole."""

    __slots__ = ("at", "octets")

    def __init__(self, octets: bytes) -> None:
        self.octets = octets
        self.at = 0

    def note(self) -> Note:
        kind = self.octets[self.at]
        if kind == DISPATCHED:
            return self._dispatched()
        if kind == PREFILL_ENDED:
            _, lease_id = _LEASE.unpack_from(self.octets, self.at)
            self.at += _LEASE.size
            return PrefillEnded(lease_id)
        if kind == RELEASED:
            return self._released()
        return self._rarer(kind)

    def _rarer(self, kind: int) -> Note:
        if kind in (EVICTED, HOLDS):
            return self._hashes(kind)
        if kind == OPEN_LEASES:
            return self._open_leases()
        if kind == STATE:
            return self._state()
        if kind == RESPONSE:
            _, response_key, key = _RESPONSE.unpack_from(self.octets, self.at)
            self.at += _RESPONSE.size
            return Response(response_key, key)
        if kind == CLEARED:
            _, key = _REPLICA.unpack_from(self.octets, self.at)
            self.at += _REPLICA.size
            return Cleared(key)
        raise ValueError(f"no note is of kind {kind}")

    def _dispatched(self) -> Note:
        head = _DISPATCHED.unpack_from(self.octets, self.at)
        count: int = head[8]
        if count > limits.NOTE_POINTS_MAX:
            raise ValueError(f"a chain of {count} points")
        points = _POINTS[count]
        values: tuple[int, ...] = points.unpack_from(self.octets, self.at + _DISPATCHED.size)
        lease = _lease(head[1:8])
        ends = values[count:]
        before = 0
        for end in ends:
            if end < before:
                raise ValueError("the points of a chain are not in order")
            before = end
        self.at += _DISPATCHED.size + points.size
        return Dispatched(lease, values[:count], ends)

    def _released(self) -> Note:
        _, lease_id, prompt, cached, completion = _RELEASED.unpack_from(self.octets, self.at)
        usage: Usage | None = None
        if prompt != _NO_COUNT:
            found = None if cached == _NO_COUNT else _count(cached)
            usage = Usage(_count(prompt), _count(completion), found)
        self.at += _RELEASED.size
        return Released(lease_id, usage)

    def _state(self) -> Note:
        _, fresh, key, resident, waiting, ratio = _STATE.unpack_from(self.octets, self.at)
        possible = resident >= -1 and -1 <= waiting <= limits.NOTE_TOKENS_MAX
        if not (possible and -1.0 <= ratio <= 1.0):
            raise ValueError("a replica's state is impossible")
        self.at += _STATE.size
        return State(key, fresh != 0, resident, waiting, ratio)

    def _hashes(self, kind: int) -> Note:
        _, key, count = _HASHES.unpack_from(self.octets, self.at)
        if count > limits.NOTE_HASHES_MAX:
            raise ValueError(f"{count} hashes in one note")
        sizes = f"{count}I" if kind == HOLDS else ""
        body = Struct(f"<{count}Q{sizes}")
        values: tuple[int, ...] = body.unpack_from(self.octets, self.at + _HASHES.size)
        self.at += _HASHES.size + body.size
        if kind == HOLDS:
            return Holds(key, values[:count], values[count:])
        return Evicted(key, values)

    def _open_leases(self) -> Note:
        _, first, span, count = _OPEN.unpack_from(self.octets, self.at)
        if count > limits.NOTE_LEASES_MAX:
            raise ValueError(f"{count} leases in one note")
        begin = self.at + _OPEN.size
        end = begin + count * _ENTRY.size
        if end > len(self.octets):
            raise ValueError("a list of leases is cut off")
        leases = [_lease(entry) for entry in _ENTRY.iter_unpack(self.octets[begin:end])]
        note = OpenLeases(first, span, leases)
        for lease in leases:
            if not note.covers(lease.lease_id):
                raise ValueError("a lease outside of its list")
        self.at = end
        return note


def _lease(fields: tuple[int, int, int, int, int, int, float]) -> OpenLease:
    flags, lease_id, key, prefill, cached, prompt_bytes, weight = fields
    if not 0.0 <= weight <= limits.NOTE_WEIGHT_MAX:  # neither is a number that is none
        raise ValueError("a lease of impossible weight")
    return OpenLease(
        lease_id,
        key,
        _count(prefill),
        _count(cached),
        prompt_bytes,
        stream=flags & _STREAM != 0,
        weight=weight,
        prefill_ended=flags & _PREFILL_ENDED != 0,
        yields=flags & _YIELDS != 0,
    )


def _count(tokens: int) -> int:
    if tokens > limits.NOTE_TOKENS_MAX:
        raise ValueError(f"{tokens} tokens in one request")
    return tokens
