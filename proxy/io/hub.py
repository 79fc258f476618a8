"""The supervisor's exchange of notes: who listens, and what goes to peers and comes from them.

Workers read themselves what their siblings say (`core.note_ring`), and what the supervisor says of
engines, or for peers. What workers say is read here for peers, who wait for it, and for whoever
overhears; the hub understands no note. An *origin* is a worker whose notes are heard, ours or a
peer's, by a number that is never used again, so that what a dead worker held can be let go and is
not mistaken for its successor's. What comes from a peer goes to our workers and no further: proxies
are linked each to each, and a decision crosses one link.

Nobody is waited for. Who does not take what waits for him, or was overtaken, misses notes, and is
told all that is open.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from proxy.core import limits, peer_wire
from proxy.core.note_ring import Said
from proxy.io import control
from proxy.io.shared_cells import SharedNotes
from proxy.io.sharing import NOBODY
from proxy.io.tasks import beat
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.hub")

TICK_S = 0.25
DIGEST_INTERVAL_S = 30.0  # a peer that comes back soon has told us already


class Peer(Protocol):
    """A link to another proxy."""

    name: str

    @property
    def waiting_bytes(self) -> int: ...

    def send(self, frame: bytes) -> None: ...

    def fail(self, reason: str) -> None:
        """End it."""


class Overhearer(Protocol):
    """One in this process who wants to know what all workers decide."""

    def heard(self, origin: int, at_s: float, batch: bytes) -> None:
        """A worker, ours or a peer's, has said this; its first note was of this moment."""

    def gone(self, origin: int) -> None:
        """That worker is no more."""


class _Ear:
    """One who is told notes."""

    def __init__(self, waiting_bytes: Callable[[], int], send: Callable[[bytes], None]) -> None:
        self._waiting_bytes = waiting_bytes
        self.send = send
        self.behind = False  # it has missed something
        self.dropped_total = 0

    def tell(self, frame: bytes) -> bool:
        """Send notes, or drop them and remember that; return whether they were sent."""
        self.behind = self.behind or self._waiting_bytes() > limits.NOTES_WAITING_BYTES_MAX
        if self.behind:
            self.dropped_total += 1
        else:
            self.send(frame)
        return not self.behind

    def caught_up(self) -> bool:
        """Say, once, that it has taken what waited."""
        if self.behind and self._waiting_bytes() * 2 <= limits.NOTES_WAITING_BYTES_MAX:
            self.behind = False
            return True
        return False


class _Member(_Ear):
    """A worker of ours."""

    def __init__(self, origin: int, channel: control.Channel) -> None:
        super().__init__(lambda: channel.waiting_bytes, channel.send_frame)
        self.origin = origin
        self.channel = channel


class _Linked(_Ear):
    """A peer, and our numbers for its origins."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(lambda: peer.waiting_bytes, peer.send)
        self.peer = peer
        self.origins: dict[int, int] = {}
        self.whole_asked_s = -limits.NOTES_WHOLE_S  # when it last asked for all that is open


class _Transfer:
    """A digest on its way: from a worker of ours or a peer, to workers of ours or a peer."""

    def __init__(
        self, source: _Ear, members: list[_Member], linked: _Linked | None = None, theirs: int = 0
    ) -> None:
        self.source = source
        self.members = members
        self.linked = linked
        self.theirs = theirs  # the number that the peer gave it


class Hub:
    """All who exchange notes. Its methods are the events; `tick` comes four times a second."""

    def __init__(self, workers: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self.notes = SharedNotes(workers)
        self._overhearer: Overhearer | None = None
        self._members: dict[int, _Member] = {}
        self._linked: dict[Peer, _Linked] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._numbers = itertools.count(NOBODY + 1)
        self._whole_due = False
        self._peers_whole_due = False
        self._fleet_known = False
        self._peer_asked_s = -DIGEST_INTERVAL_S
        self.told = asyncio.Event()  # a peer that asked what is cached where
        self._dropped_total = 0  # by those who are gone
        self._batches_total = 0
        self._peer_batches_total = 0

    async def run(self) -> None:
        while True:
            await beat(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Have told as a whole what somebody has missed."""
        self.collect()
        for member in self._members.values():
            if member.caught_up():
                self._whole_due = self._peers_whole_due = True
        for linked in self._linked.values():
            self._whole_due = linked.caught_up() or self._whole_due
        if self._peers_whole_due:
            self._peers_whole_due = False
            for linked in self._linked.values():
                linked.send(peer_wire.write_whole())
        if self._whole_due:
            self._whole_due = False
            self._order(control.Whole())

    def say(self, batch: bytes) -> None:
        """Tell our workers what the supervisor knows: of engines' caches and loads."""
        self.notes.writer.write(NOBODY, self._now_s(), batch)

    def overhear(self, overhearer: Overhearer | None) -> None:
        """Have everything told to this one as well from now on, or to nobody."""
        if overhearer is not self._overhearer:
            self._overhearer = overhearer
            self._say_who_listens()

    def know_fleet(self) -> None:
        """From now on a worker can make use of what others know of replicas."""
        if not self._fleet_known:
            self._fleet_known = True
            self._ask_a_peer(list(self._members.values()))

    # --- our workers -------------------------------------------------------------------------

    def join(self, channel: control.Channel) -> int:
        """A worker has been started and greeted; return its origin."""
        origin = next(self._numbers)
        newcomer = self._members[origin] = _Member(origin, channel)
        self._say_who_listens()
        self._whole_due = self._peers_whole_due = True
        self._acquaint([newcomer])
        return origin

    def leave(self, origin: int) -> None:
        """It is no more."""
        self.collect()
        member = self._members.pop(origin, None)
        if member is None:
            return
        self._dropped_total += member.dropped_total
        self._forget(origin)
        for linked in self._linked.values():
            linked.send(peer_wire.write_gone(origin))
        self._end_transfers_of(member)
        self._say_who_listens()

    def hear(self, origin: int, message: control.FromWorker) -> None:
        """A worker says this."""
        match message:
            case control.Noted():
                self.collect()
            case control.Missed():
                self._whole_due = self._peers_whole_due = True
            case control.Page(transfer, batch, last):
                self._turn(self._members.get(origin), transfer, batch, last)
            case control.Garbled(faulty, reason):
                self._blame(faulty, reason)
            case control.GiveWay():
                self._pass_on(origin, message)

    def collect(self) -> None:
        """Take what our workers have said, for those who want to know."""
        for reader in self.notes.readers:
            if not (self._linked or self._overhearer):
                reader.skip()
            elif reader.has_news:
                lost_total = reader.lost_total
                said = [one for one in reader.take() if one.origin in self._members]
                if reader.lost_total != lost_total:
                    self._dropped_total += reader.lost_total - lost_total
                    self._whole_due = True
                self._overhear(said)
                if self._linked:
                    for batch in _joined(said):
                        self._relay(batch)

    def _relay(self, said: Said) -> None:
        """Tell peers."""
        self._batches_total += 1
        age_s = min(max(0.0, self._now_s() - said.at_s), peer_wire.AGE_S_MAX)
        frame = peer_wire.write_notes(said.origin, age_s, said.batch)
        for linked in self._linked.values():
            linked.tell(frame)

    def _overhear(self, said: Iterable[Said]) -> None:
        if self._overhearer is not None:
            for one in said:
                self._overhearer.heard(one.origin, one.at_s, one.batch)

    def _pass_on(self, asker: int, message: control.GiveWay) -> None:
        """Have one give way, unless he is gone, and all let the one who asks go first.

        Lost on those who are behind: then the request waits as if nobody had been asked.
        """
        if message.origin not in self._members:
            return
        whole = control.frame_of(message)
        empty = control.frame_of(control.GiveWay(message.origin, message.replica, []))
        for member in self._members.values():
            if member.origin != asker:
                member.tell(whole if member.origin == message.origin else empty)

    def _blame(self, origin: int, reason: str) -> None:
        """A worker cannot read the notes of this one."""
        _log.error("notes of origin %d cannot be read: %s", origin, reason)
        for linked in list(self._linked.values()):
            if origin in linked.origins.values():
                linked.peer.fail(f"its notes cannot be read: {reason}")

    def _forget(self, origin: int) -> None:
        self._order(control.Gone(origin))
        if self._overhearer is not None:
            self._overhearer.gone(origin)

    def _order(self, message: control.Message) -> None:
        """Tell all workers what none may miss."""
        frame = control.frame_of(message)
        for member in self._members.values():
            member.send(frame)

    def _say_who_listens(self) -> None:
        hurry = bool(self._linked)
        on = len(self._members) > 1 or hurry or self._overhearer is not None
        for member in self._members.values():
            member.channel.send(control.Listen(on, member.origin, hurry))

    # --- peers -------------------------------------------------------------------------------

    def link(self, peer: Peer) -> None:
        """A peer has shown who it is."""
        self._linked[peer] = _Linked(peer)
        self._say_who_listens()
        self._whole_due = True
        peer.send(peer_wire.write_whole())
        if self._fleet_known and self._now_s() - self._peer_asked_s >= DIGEST_INTERVAL_S:
            self._ask_a_peer(list(self._members.values()))

    def unlink(self, peer: Peer) -> None:
        """It is gone, and all its workers with it, as far as we can know."""
        linked = self._linked.pop(peer, None)
        if linked is None:
            return
        self._dropped_total += linked.dropped_total
        for origin in linked.origins.values():
            self._forget(origin)
        self._end_transfers_of(linked)
        self._say_who_listens()

    def hear_peer(self, peer: Peer, frame: peer_wire.Frame, delay_s: float) -> None:
        """A peer says this, which was on its way for about so long. Raises `WireError`."""
        linked = self._linked[peer]
        if frame.kind == peer_wire.NOTES:
            origin = linked.origins.get(frame.number)
            if origin is None:
                if sum(len(each.origins) for each in self._linked.values()) >= limits.ORIGINS_MAX:
                    raise peer_wire.WireError("more workers speak than can be heard")
                origin = linked.origins[frame.number] = next(self._numbers)
            self._peer_batches_total += 1
            said = Said(origin, self._now_s() - frame.figure - delay_s, frame.batch)
            self.notes.writer.write(said.origin, said.at_s, said.batch)
            self._overhear((said,))
        elif frame.kind == peer_wire.GONE:
            gone = linked.origins.pop(frame.number, None)
            if gone is not None:
                self._forget(gone)
        elif frame.kind == peer_wire.WHOLE:
            if self._now_s() - linked.whole_asked_s >= limits.NOTES_WHOLE_S:
                linked.whole_asked_s = self._now_s()
                self._whole_due = True
        elif frame.kind == peer_wire.ASK:
            self._answer(linked, frame.number)
        elif frame.kind == peer_wire.PAGE:
            self._turn(linked, frame.number, frame.batch, frame.figure != 0.0)

    # --- digests -----------------------------------------------------------------------------

    def _acquaint(self, newcomers: list[_Member]) -> None:
        """Have the eldest of the others tell these what is cached where, or else a peer."""
        eldest = next((each for each in self._members.values() if each not in newcomers), None)
        if eldest is not None:
            self._start(_Transfer(eldest, newcomers))
        elif self._fleet_known:
            self._ask_a_peer(newcomers)

    def _ask_a_peer(self, members: list[_Member]) -> None:
        """Have a peer tell these workers what is cached where, if there is one."""
        linked = next(iter(self._linked.values()), None)
        if linked is not None and members:
            self._peer_asked_s = self._now_s()
            self._start(_Transfer(linked, members))

    def _answer(self, linked: _Linked, theirs: int) -> None:
        """A peer asks; the eldest of our workers answers, once at a time."""
        eldest = next(iter(self._members.values()), None)
        busy = any(transfer.linked is linked for transfer in self._transfers.values())
        if eldest is None or busy:
            linked.send(peer_wire.write_page(theirs, b"", last=True))
        else:
            self._start(_Transfer(eldest, [], linked, theirs))

    def _start(self, transfer: _Transfer) -> None:
        if len(self._transfers) >= limits.DIGESTS_MAX:
            return
        number = next(self._numbers)
        self._transfers[number] = transfer
        if isinstance(transfer.source, _Member):
            transfer.source.channel.send(control.Recite(number))
        else:
            transfer.source.send(peer_wire.write_ask(number))

    def _turn(self, source: _Ear | None, number: int, batch: bytes, last: bool) -> None:
        """A page has come: pass it on. It is lost on those who are behind."""
        transfer = self._transfers.get(number)
        if transfer is None or transfer.source is not source:
            return
        if batch and transfer.members:
            heard = control.frame_of(control.Heard(batch))
            for member in transfer.members:
                member.tell(heard)
        if transfer.linked is not None:
            page = peer_wire.write_page(transfer.theirs, batch, last=last)
            if not transfer.linked.tell(page) and last:
                transfer.linked.send(peer_wire.write_page(transfer.theirs, b"", last=True))
        if last:
            del self._transfers[number]
            if transfer.linked is not None:
                self.told.set()

    def _end_transfers_of(self, ear: _Ear) -> None:
        for number, transfer in list(self._transfers.items()):
            transfer.members = [member for member in transfer.members if member is not ear]
            if ear in (transfer.source, transfer.linked):
                del self._transfers[number]
                if transfer.linked is not None and transfer.linked is not ear:
                    transfer.linked.send(peer_wire.write_page(transfer.theirs, b"", last=True))
                if transfer.members:  # whoever told them is gone, and another is asked
                    self._acquaint(transfer.members)

    # --- what is reported --------------------------------------------------------------------

    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges."""
        ears: list[_Ear] = [*self._members.values(), *self._linked.values()]
        dropped_total = self._dropped_total + sum(ear.dropped_total for ear in ears)
        counters = [
            Sample("note_batches_total", (("from", "workers"),), self._batches_total),
            Sample("note_batches_total", (("from", "peers"),), self._peer_batches_total),
            Sample("note_batches_dropped_total", (), dropped_total),
        ]
        return counters, [Sample("peers", (), len(self._linked))]


def _joined(said: Iterable[Said]) -> Iterator[Said]:
    """Yield these as batches, each of one origin, with the moment of its first note."""
    parts: list[bytes] = []
    origin, at_s, size = NOBODY, 0.0, 0
    for one in said:
        if parts and (one.origin != origin or size >= limits.NOTES_BATCH_BYTES_MAX):
            yield Said(origin, at_s, b"".join(parts))
            parts, size = [], 0
        if not parts:
            origin, at_s = one.origin, one.at_s
        parts.append(one.batch)
        size += len(one.batch)
    if parts:
        yield Said(origin, at_s, b"".join(parts))
