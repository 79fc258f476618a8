"""What a worker shares: its picture with what others say in it, and what it says itself.

What others say is read when it matters (`catch_up`): before a choice, while requests wait, before
it is shown, and else twice a second, or more often the more there is to read.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Iterable, Sequence

from proxy.core import limits, note_wire, notes
from proxy.core.hearsay import Hearsay
from proxy.core.note_ring import RingReader, Said
from proxy.core.picture import Picture
from proxy.core.responses import Responses
from proxy.io import control
from proxy.io.clock import Clock
from proxy.io.noting import Noting
from proxy.io.tasks import Tasks, beat
from proxy.io.telemetry import SECONDS_BUCKETS, Histogram, Sample

_log = logging.getLogger("doherty.sharing")

NOBODY = 0  # the origin of what the supervisor itself has to say
PAGE_ENTRIES_MAX = limits.NOTE_HASHES_MAX
_ENTRY_BYTES = 12  # a hash and a size


def recital_s(replicas: int) -> float:
    """Return how long telling all that may be told of so many replicas takes at most."""
    entries = limits.DIGEST_BYTES_MAX // _ENTRY_BYTES + limits.RESPONSES_MAX
    pages = entries // PAGE_ENTRIES_MAX + replicas + 1  # each one's last page need not be full
    return pages * (limits.DIGEST_PAUSE_S + limits.DIGEST_PAGE_S)


def next_pause_s(pause_s: float, count: int) -> float:
    """Return when to read again, if there were so many notes after such a pause."""
    fitting_s = pause_s * min(2.0, limits.NOTES_TURN_MAX / max(1, count))
    return min(limits.SWEEP_INTERVAL_S, max(limits.NOTES_READ_S_MIN, fitting_s))


class Sharing:
    """Both directions of one worker's notes."""

    def __init__(
        self,
        picture: Picture,
        responses: Responses,
        noting: Noting,
        clock: Clock,
        tasks: Tasks,
        give_way: Callable[[str, Sequence[int]], None],
        *,
        on_news: Callable[[], None],
        on_fault: Callable[[], None],
    ) -> None:
        """`give_way(replica, leases)` ends those for another worker's online request.

        `on_news()` hears that others have decided something, `on_fault()` that what they say fails.
        """
        self._picture = picture
        self._responses = responses
        self._clock = clock
        self._tasks = tasks
        self._give_way = give_way
        self._on_news = on_news
        self._on_fault = on_fault
        self._channel: control.Channel | None = None
        self._readers: list[RingReader] = []
        self._lost_total = 0
        self._lag_s = Histogram(SECONDS_BUCKETS)
        self._garbled_total = 0
        self.noting = noting
        self.hearsay = Hearsay(picture, responses)

    def connect(self, channel: control.Channel, readers: Sequence[RingReader]) -> None:
        """Read what these say from now on."""
        self._channel = channel
        self._readers = list(readers)

    async def read_regularly(self) -> None:
        """Hear what is said while nobody here needs to know it."""
        pause_s = limits.SWEEP_INTERVAL_S
        while True:
            await beat(pause_s)
            before = self.hearsay.heard_total + self._lost_total
            self.catch_up()
            count = self.hearsay.heard_total + self._lost_total - before
            pause_s = next_pause_s(pause_s, count)

    def catch_up(self) -> None:
        """Hear what others have said since, in the order in which they decided it."""
        said = [reader.take() for reader in self._readers if reader.has_news]
        if not said:
            return
        now_s = self._clock.now_s()
        for one in heapq.merge(*said, key=_moment_s) if len(said) > 1 else said[0]:
            try:
                self.hear(one, now_s)
            except Exception:  # noqa: BLE001 - of one batch; who reads has another thing to do
                self._on_fault()
                _log.exception("what origin %d said", one.origin)
        self._on_news()
        lost_total = sum([reader.lost_total for reader in self._readers])
        if lost_total != self._lost_total:
            self._lost_total = lost_total
            self._send(control.Missed())

    def know(self, names: Iterable[str]) -> None:
        """These are the replicas now. What was said before of one that is new is told again."""
        if self.hearsay.know(names):
            self._send(control.Missed())

    def hear(self, said: Said, now_s: float) -> None:
        """Take it in as of the moment in which it was decided."""
        at_s = min(said.at_s, now_s)
        fault = self.hearsay.hear(said.origin, said.batch, at_s, ours=said.ours)
        self._lag_s.observe(now_s - at_s)
        if fault is not None:
            self._garbled_total += 1
            self._send(control.Garbled(said.origin, fault))

    def _send(self, message: control.Message) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def obey(self, channel: control.Channel, message: control.Sharing) -> None:
        """Do what the supervisor says of notes."""
        match message:
            case control.Heard(batch):
                now_s = self._clock.now_s()
                self.hear(Said(NOBODY, now_s, batch), now_s)
            case control.Gone(origin):
                self.catch_up()  # it may have said something before
                self.hearsay.forget(origin, self._clock.now_s())
            case control.Listen(on, origin, hurry):
                self.noting.listen(on=on, origin=origin, hurry=hurry)
            case control.Whole():
                self.noting.tell_all()
            case control.GiveWay(_, replica_name, lease_ids):
                self._give_way(replica_name, lease_ids)
            case control.Recite(transfer):
                self._tasks.start("recite", self._recite(channel, transfer))

    async def _recite(self, channel: control.Channel, transfer: int) -> None:
        """Tell what is cached where, a page at a time, so that nobody is held up for long."""
        slots = dict(self._picture.slots)
        entries_max = limits.DIGEST_BYTES_MAX // _ENTRY_BYTES // max(1, len(slots))
        for name, slot in slots.items():
            self.catch_up()  # what is gone by now is not to be told as there
            key = notes.replica_key(name)
            # Of more than we may tell, the most recent count; what is not told is told again.
            left_out = self._picture.index.count(slot) - entries_max
            hashes: list[int] = []
            sizes: list[int] = []
            for place, (entry, octets) in enumerate(self._picture.index.dump(slot)):
                if place < left_out:
                    continue
                hashes.append(entry)
                sizes.append(octets)
                if len(hashes) == PAGE_ENTRIES_MAX:
                    page = note_wire.write_holds(key, hashes, sizes)
                    channel.send(control.Page(transfer, page, last=False))
                    hashes, sizes = [], []
                    await self._room(channel)
                    if self._picture.slots.get(name) != slot:
                        break  # another has it now
            if hashes:
                page = note_wire.write_holds(key, hashes, sizes)
                channel.send(control.Page(transfer, page, last=False))
                await self._room(channel)
        await self._recite_responses(channel, transfer)
        channel.send(control.Page(transfer, b"", last=True))

    async def _recite_responses(self, channel: control.Channel, transfer: int) -> None:
        page: list[bytes] = []
        for response_key, name in self._responses.dump():
            page.append(note_wire.write_response(response_key, notes.replica_key(name)))
            if len(page) == PAGE_ENTRIES_MAX:
                channel.send(control.Page(transfer, b"".join(page), last=False))
                page = []
                await self._room(channel)
        if page:
            channel.send(control.Page(transfer, b"".join(page), last=False))

    async def _room(self, channel: control.Channel) -> None:
        """Let others have their turn, and the supervisor take what waits."""
        await asyncio.sleep(limits.DIGEST_PAUSE_S)
        await channel.drained()

    # --- what is reported --------------------------------------------------------------------

    def counters(self) -> list[Sample]:
        hearsay, noting = self.hearsay, self.noting
        return [
            Sample("notes_sent_total", (), noting.sent_total),
            Sample("notes_heard_total", (), hearsay.heard_total),
            Sample("notes_lost_total", (("reason", "overtaken"),), self._lost_total),
            Sample("notes_lost_total", (("reason", "unknown_replica"),), hearsay.unknown_total),
            Sample("notes_lost_total", (("reason", "no_room"),), hearsay.full_total),
            Sample("notes_lost_total", (("reason", "garbled"),), self._garbled_total),
            self._lag_s.sample("note_lag_seconds", ()),
        ]

    def gauges(self) -> list[Sample]:
        return [Sample("leases_of_others", (), self.hearsay.leases())]


def _moment_s(said: Said) -> float:
    return said.at_s
