"""What other routers have decided, as they tell it, put into our picture.

Each origin has a table of what it holds open. Notes may be missing and nothing may stay wrong: an
end that nobody told comes with the next list of what is open, and with an origin goes everything
that it held. Replicas that we do not know are none of ours. The tables are bounded; beyond that, a
dispatch still says what is cached where.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proxy.core import limits, note_wire, notes
from proxy.core.lease import Lease
from proxy.core.note_wire import NoteError
from proxy.core.notes import Note, OpenLease, OpenLeases
from proxy.core.picture import Picture
from proxy.core.prefix import PrefixChain
from proxy.core.responses import Responses
from proxy.core.usage import Usage


class Hearsay:
    """Writes what others say into one picture, and into one table of stored answers."""

    def __init__(self, picture: Picture, responses: Responses) -> None:
        self._picture = picture
        self._responses = responses
        self._names: dict[int, str] = {}  # of replicas, by key
        self._strange: set[int] = set()  # keys that others used since, of whom we do not know
        self._origins: dict[int, dict[int, Lease]] = {}
        # Unanswered offline work of this proxy's other workers, each with its origin: who needs its
        # place asks for that. As many as there are leases.
        self.yielding: dict[Lease, int] = {}
        self._asked = 0  # the origin that is being heard, if it can be asked; else 0
        self.inflight: dict[str, int] = {}  # of others, by replica
        self.states: dict[str, notes.State] = {}  # what engines said last, by replica
        self.states_at_s: dict[str, float] = {}  # and when
        self.heard_total = 0
        self.unknown_total = 0  # of replicas that we do not know
        self.full_total = 0  # found no room

    def know(self, names: Iterable[str]) -> bool:
        """These are the replicas now; return whether others spoke of some before we knew them."""
        self._names = {notes.replica_key(name): name for name in names}
        missed = not self._strange.isdisjoint(self._names)
        self._strange.clear()
        known = set(self._names.values())
        for gone in [name for name in self.states if name not in known]:
            del self.states[gone], self.states_at_s[gone]
        return missed

    def leases(self) -> int:
        """Return how many leases of others are held."""
        return sum([len(table) for table in self._origins.values()])

    def hear(self, origin: int, batch: bytes, now_s: float, *, ours: bool = False) -> str | None:
        """Take in a batch; return why it could not be read whole, if so.

        `ours`: it is of a worker of this proxy, which can be asked to end what yields.
        What came before the fault counts. Then the origin is as if it had said nothing: it may
        have lost its place, and a list of what it holds open will come.
        """
        fault = None
        try:
            found = note_wire.read_notes(batch)
        except NoteError as error:
            found, fault = error.before, str(error)
        table = self._origins.get(origin)
        if table is None:
            if len(self._origins) >= limits.ORIGINS_MAX:
                self.full_total += len(found)
                return fault
            table = self._origins[origin] = {}
        self._asked = origin if ours else 0
        for note in found:
            self._apply(table, note, now_s)
        self.heard_total += len(found)
        if fault is not None:
            self.forget(origin, now_s)
        return fault

    def forget(self, origin: int, now_s: float) -> None:
        """The origin is gone, and with it whatever it held."""
        table = self._origins.pop(origin, None)
        if table is not None:
            for lease in table.values():
                self._end(lease, now_s, None)

    # --- single notes ------------------------------------------------------------------------

    def _apply(self, table: dict[int, Lease], note: Note, now_s: float) -> None:
        if isinstance(note, notes.Dispatched):
            self._dispatched(table, note, now_s)
        elif isinstance(note, notes.PrefillEnded):
            lease = table.get(note.lease_id)
            if lease is not None:
                self._answered(lease, now_s)
        elif isinstance(note, notes.Released):
            lease = table.pop(note.lease_id, None)
            if lease is not None:
                self._end(lease, now_s, note.usage)
        elif isinstance(note, OpenLeases):
            self._compare(table, note, now_s)
        else:
            self._of_engine(note, now_s)

    def _dispatched(self, table: dict[int, Lease], note: notes.Dispatched, now_s: float) -> None:
        before = table.pop(note.lease.lease_id, None)
        if before is not None:
            self._end(before, now_s, None)
        lease = self._lease(note.lease)
        if lease is None:
            return
        chain = PrefixChain(0, note.hashes, note.ends, note.lease.prompt_bytes)
        if len(table) >= limits.FOREIGN_LEASES_MAX:
            self.full_total += 1
            self._picture.index.note(lease.slot, chain)
            return
        self._picture.dispatched(lease, chain, now_s)
        self._keep(table, lease)

    def _compare(self, table: dict[int, Lease], note: OpenLeases, now_s: float) -> None:
        """Let go what is not on the list, and take on what we have missed."""
        listed = {lease.lease_id: lease for lease in note.leases}
        for lease_id in [known for known in table if note.covers(known) and known not in listed]:
            self._end(table.pop(lease_id), now_s, None)
        for lease_id, said in listed.items():
            known = table.get(lease_id)
            if known is None:
                self._join(table, said, now_s)
            elif said.prefill_ended:
                self._answered(known, now_s)

    def _join(self, table: dict[int, Lease], said: OpenLease, now_s: float) -> None:
        lease = self._lease(said)
        if lease is None:
            return
        if len(table) >= limits.FOREIGN_LEASES_MAX:
            self.full_total += 1
            return
        self._picture.loads.acquire(lease, now_s)
        if said.prefill_ended:
            self._picture.loads.prefilling.ended(lease, now_s)
            lease.head_s = -1.0  # we have not seen how long it took
        self._keep(table, lease)

    def _of_engine(self, note: Note, now_s: float) -> None:
        index = self._picture.index
        if isinstance(note, notes.Evicted):
            slot = self._slot(note.replica_key)
            if slot >= 0:
                for prefix in note.hashes:
                    index.drop(slot, prefix)
        elif isinstance(note, notes.Holds):
            self._load(note.replica_key, note.hashes, note.sizes)
        elif isinstance(note, notes.Cleared):
            slot = self._slot(note.replica_key)
            if slot >= 0:
                index.clear(slot)
        elif isinstance(note, notes.State):
            if self._slot(note.replica_key) >= 0:
                name = self._names[note.replica_key]
                self.states[name], self.states_at_s[name] = note, now_s
        elif isinstance(note, notes.Response) and self._slot(note.replica_key) >= 0:
            self._responses.stored(note.response_key, self._names[note.replica_key])

    def _load(self, key: int, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        slot = self._slot(key)
        if slot >= 0:
            for place in range(len(hashes)):
                self._picture.index.load(slot, hashes[place], sizes[place])

    # --- leases of others --------------------------------------------------------------------

    def _lease(self, said: OpenLease) -> Lease | None:
        """Return a lease as ours, or None when its replica is none of ours."""
        slot = self._slot(said.replica_key)
        if slot < 0:
            return None
        prompt_tokens = said.prefill_tokens + said.cached_tokens
        lease = Lease(
            slot,
            self._names[said.replica_key],
            prefill_tokens=said.prefill_tokens,
            prompt_tokens=prompt_tokens,
            streamed=said.stream,
            weight=said.weight,
            lease_id=said.lease_id,
        )
        lease.yields = said.yields
        lease.life = self._picture.life_of(slot)
        lease.prompt_octets = said.prompt_bytes
        lease.cached_octets = said.prompt_bytes * said.cached_tokens // max(1, prompt_tokens)
        return lease

    def _slot(self, key: int) -> int:
        """Return the slot of a replica, or -1 when we do not know it."""
        name = self._names.get(key)
        slot = self._picture.slots.get(name, -1) if name is not None else -1
        if slot < 0:
            self.unknown_total += 1
            if len(self._strange) < limits.STRANGERS_MAX:
                self._strange.add(key)
        return slot

    def _keep(self, table: dict[int, Lease], lease: Lease) -> None:
        table[lease.lease_id] = lease
        if lease.yields and lease.pending and self._asked:
            self.yielding[lease] = self._asked
        self.inflight[lease.replica_name] = self.inflight.get(lease.replica_name, 0) + 1

    def _answered(self, lease: Lease, now_s: float) -> None:
        if lease.yields:
            self.yielding.pop(lease, None)
        self._picture.prefill_ended(lease, now_s)

    def _end(self, lease: Lease, now_s: float, usage: Usage | None) -> None:
        if lease.yields:
            self.yielding.pop(lease, None)
        left = self.inflight[lease.replica_name] - 1
        if left:
            self.inflight[lease.replica_name] = left
        else:
            del self.inflight[lease.replica_name]
        self._picture.release(lease, now_s, usage, served=usage is not None)
