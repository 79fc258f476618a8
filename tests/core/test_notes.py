"""Notes survive the wire, and no octets can do more harm than to be refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits, note_wire, notes
from proxy.core.note_wire import NoteError
from proxy.core.notes import OpenLease
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
TOKENS = st.integers(0, limits.NOTE_TOKENS_MAX)
LEASES = st.builds(
    OpenLease,
    U32, U64, TOKENS, TOKENS, U32,
    stream=st.booleans(),
    weight=st.floats(0, limits.NOTE_WEIGHT_MAX, width=32),
    prefill_ended=st.booleans(),
    yields=st.booleans(),
)  # fmt: skip
POINTS = st.lists(st.tuples(U32, U64), max_size=limits.NOTE_POINTS_MAX).map(sorted)
CHAINS = POINTS.map(
    lambda points: PrefixChain(0, tuple(h for _, h in points), tuple(e for e, _ in points), 0)
)
USAGES = st.none() | st.builds(Usage, TOKENS, TOKENS, st.none() | TOKENS)
PAIRS = st.lists(st.tuples(U64, U32), max_size=40)


def plain(value: object) -> object:
    """Return a note as values that compare."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, notes.Note | OpenLease):
        names = [name for name in dir(value) if not name.startswith("_") and name != "covers"]
        return [type(value).__name__, *(plain(getattr(value, name)) for name in names)]
    return tuple(value) if isinstance(value, tuple) and not isinstance(value, Usage) else value


WRITTEN = st.one_of(
    st.builds(
        lambda lease, chain: (
            note_wire.write_dispatched(lease, chain),
            notes.Dispatched(lease, chain.hashes, chain.ends),
        ),
        LEASES,
        CHAINS,
    ),
    U32.map(
        lambda lease_id: (note_wire.write_prefill_ended(lease_id), notes.PrefillEnded(lease_id))
    ),
    st.builds(lambda i, u: (note_wire.write_released(i, u), notes.Released(i, u)), U32, USAGES),
    st.builds(
        lambda key, hashes: (note_wire.write_evicted(key, hashes), notes.Evicted(key, hashes)),
        U64,
        st.lists(U64, min_size=1, max_size=40).map(tuple),
    ),
    U64.map(lambda key: (note_wire.write_cleared(key), notes.Cleared(key))),
    st.builds(
        notes.State,
        U64,
        st.booleans(),
        st.integers(-1, 1 << 60),
        st.integers(-1, limits.NOTE_TOKENS_MAX),
        st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
    ).map(lambda state: (note_wire.write_state(state), state)),
    st.builds(lambda r, k: (note_wire.write_response(r, k), notes.Response(r, k)), U64, U64),
    st.builds(
        lambda key, pairs: (
            note_wire.write_holds(key, [h for h, _ in pairs], [s for _, s in pairs]),
            notes.Holds(key, tuple(h for h, _ in pairs), tuple(s for _, s in pairs)),
        ),
        U64,
        PAIRS,
    ),
)


@given(st.lists(WRITTEN, max_size=8))
def test_what_is_written_is_read(written: list[tuple[bytes, notes.Note]]) -> None:
    batch = b"".join(octets for octets, _ in written)
    assert plain(note_wire.read_notes(batch)) == plain([note for _, note in written])


@given(st.lists(WRITTEN, min_size=1, max_size=6), st.data())
def test_of_a_batch_that_is_cut_off_what_came_whole_counts(
    written: list[tuple[bytes, notes.Note]], data: st.DataObject
) -> None:
    batch = b"".join(octets for octets, _ in written)
    cut = data.draw(st.integers(0, len(batch) - 1))
    ends = [sum(len(octets) for octets, _ in written[: n + 1]) for n in range(len(written))]
    whole = sum(end <= cut for end in ends)
    if cut in (0, *ends):
        found = note_wire.read_notes(batch[:cut])
    else:
        with pytest.raises(NoteError) as refused:
            note_wire.read_notes(batch[:cut])
        found = refused.value.before
    assert plain(found) == plain([note for _, note in written[:whole]])


@given(st.binary(max_size=300), st.integers(0, 10))
def test_any_octets_are_notes_or_refused(octets: bytes, kind: int) -> None:
    for batch in (octets, bytes((kind,)) + octets):
        try:
            found = note_wire.read_notes(batch)
        except NoteError as error:
            found = error.before
        assert all(isinstance(note, notes.Note) for note in found)


def broken(note: bytes, at: int, octets: bytes) -> bytes:
    return note[:at] + octets + note[at + len(octets) :]


LEASE = OpenLease(7, 1, 10, 0, 40, stream=True, weight=1.0)
SENT = note_wire.write_dispatched(LEASE, PrefixChain(0, (5, 6), (20, 40), 40))
OPEN = note_wire.write_open_leases([LEASE], 8)[0]
USED = note_wire.write_released(1, Usage(1, 1, 1))
SAID = note_wire.write_state(notes.State(1, True, 0, 0, 1.0))
IMPOSSIBLE = {
    "a chain of 255 points": broken(SENT, 30, b"\xff"),
    "points of a chain are not in order": broken(SENT, 47, b"\xff"),
    "impossible weight": broken(SENT, 26, b"\0\0\xc0\x7f"),
    "lease of impossible weight": broken(SENT, 26, b"\0\0\x80\xbf"),
    "2147483647 tokens in one request": broken(SENT, 14, b"\xff\xff\xff\x7f"),
    "2130706432 tokens in one request": broken(USED, 5, b"\0\0\0\x7f"),
    "65535 leases in one note": broken(OPEN, 9, b"\xff\xff"),
    "a lease outside of its list": broken(OPEN, 12, (9).to_bytes(4, "little")),
    "65535 hashes in one note": broken(note_wire.write_evicted(1, [2]), 9, b"\xff\xff"),
    "a replica's state is impossible": broken(SAID, 26, b"\xff" * 4),
    "no note is of kind 0": b"\0",
}


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_what_cannot_be_is_refused(reason: str) -> None:
    with pytest.raises(NoteError, match=reason) as refused:
        note_wire.read_notes(note_wire.write_cleared(3) + IMPOSSIBLE[reason])
    assert len(refused.value.before) == 1


def test_counts_are_written_within_their_bounds() -> None:
    huge = OpenLease(1, 1, 1 << 40, -5, 1 << 40, stream=False, weight=1.0)
    points = tuple(range(1, 100))
    sent = note_wire.write_dispatched(huge, PrefixChain(0, points, points, 1 << 40))
    (note,) = note_wire.read_notes(sent + note_wire.write_evicted(1, range(5000))[:0])
    assert isinstance(note, notes.Dispatched)
    assert note.lease.prefill_tokens == limits.NOTE_TOKENS_MAX
    assert note.lease.cached_tokens == 0
    assert len(note.hashes) == limits.NOTE_POINTS_MAX
    assert note.hashes == note.ends == (*range(1, 17), *range(84, 100))
    many = note_wire.read_notes(note_wire.write_evicted(1, range(5000)))
    assert [h for each in many if isinstance(each, notes.Evicted) for h in each.hashes] == list(
        range(5000)
    )


@given(st.integers(0, notes.IDS - 1), st.sets(st.integers(0, 3000), max_size=1200), st.data())
def test_lists_of_what_is_open_cover_half_of_all_ids_once(
    next_id: int, ages: set[int], data: st.DataObject
) -> None:
    ids = [(next_id - 1 - age) % notes.IDS for age in sorted(ages, reverse=True)]
    leases = [OpenLease(i, 1, 1, 0, 4, stream=True, weight=1.0) for i in ids]
    lists = [note_wire.read_notes(note)[0] for note in note_wire.write_open_leases(leases, next_id)]
    told = [note for note in lists if isinstance(note, notes.OpenLeases)]
    assert [lease.lease_id for note in told for lease in note.leases] == ids
    age = data.draw(st.integers(0, notes.IDS - 1))
    covering = [note for note in told if note.covers((next_id - 1 - age) % notes.IDS)]
    assert len(covering) == (age < notes.IDS // 2)
