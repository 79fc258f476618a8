"""A worker's decisions, told to the others: written where they read before they choose.

That wakes nobody, and with nobody listening it costs its caller one test of `on`. Peers, who do not
share that memory, are told by the supervisor, and that one is told that there is something: at
once, or after a moment in which more has come. A batch costs the processes that it passes through
as much as several requests do: so between two of them some time passes, and for a worker that
decides much more of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from proxy.core import limits, note_wire, notes
from proxy.core.lease import Lease
from proxy.core.note_ring import RingWriter
from proxy.core.notes import OpenLease
from proxy.core.picture import Picture
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage
from proxy.io.clock import Clock
from proxy.io.control import Channel, GiveWay, Noted

_KEYS_MAX = 4096  # names of replicas whose keys are kept


class Noting:
    """What one worker has to tell."""

    def __init__(self, clock: Clock, picture: Picture, leases: Mapping[int, Lease]) -> None:
        """`leases` are those that this worker holds, by id, as they were opened."""
        self.on = False
        self.sent_total = 0
        self._clock = clock
        self._picture = picture
        self._leases = leases
        self._channel: Channel | None = None
        self._ring: RingWriter | None = None
        self._origin = 0  # under which we are heard
        self._hurry = False  # peers wait for it
        self._keys: dict[str, int] = {}
        self._count = 0  # of notes that the supervisor has not been told of
        self._first_s = 0.0  # of those
        self._busy = False  # the last of them came fast
        self._told_s = 0.0  # when the supervisor was told last
        self._changed = False  # since all was told
        self._timer: asyncio.Handle | None = None
        self._whole_timer: asyncio.TimerHandle | None = None

    def connect(self, channel: Channel, ring: RingWriter) -> None:
        self._channel, self._ring = channel, ring

    def listen(self, *, on: bool, origin: int = 0, hurry: bool = False) -> None:
        """Begin to tell as this origin, with all that is open, or stop."""
        self._origin, self._hurry = origin, hurry
        if on == self.on or self._ring is None:
            return
        self.on = on
        if on:
            self._changed = True
            self._tell_regularly()
        else:
            self.close()

    def close(self) -> None:
        self.on = False
        for timer in (self._timer, self._whole_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._whole_timer = None
        self._count = 0

    # --- what happens ------------------------------------------------------------------------

    def dispatched(self, lease: Lease, chain: PrefixChain) -> None:
        """Prefixes that were in use just now have been told of just now."""
        self._add(note_wire.write_dispatched(self._open(lease), chain, lease.first_noted))

    def prefill_ended(self, lease: Lease) -> None:
        self._add(note_wire.write_prefill_ended(lease.lease_id))

    def released(self, lease: Lease, usage: Usage | None) -> None:
        self._add(note_wire.write_released(lease.lease_id, usage))

    def stored(self, response_key: int, replica_name: str) -> None:
        """A replica keeps an answer that later requests may go on from."""
        self._add(note_wire.write_response(response_key, self._key(replica_name)))

    def ask_way(self, origin: int, replica_name: str, lease_ids: list[int]) -> None:
        """Have another worker of this proxy end these, so that an online request of ours begins."""
        if self._channel is not None:
            self._channel.send(GiveWay(origin, replica_name, lease_ids))

    def tell_all(self) -> None:
        """Tell all that is open; and of prefixes when they are used."""
        self._picture.index.renew()
        if not self.on:
            return
        leases = [self._open(lease) for lease in self._leases.values()]
        next_id = (self._picture.last_lease_id + 1) % notes.IDS
        for note in note_wire.write_open_leases(leases, next_id):
            self._add(note)
        self._changed = False

    def _open(self, lease: Lease) -> OpenLease:
        return OpenLease(
            lease.lease_id,
            self._key(lease.replica_name),
            lease.prefill_tokens,
            lease.prompt_tokens - lease.prefill_tokens,
            lease.prompt_octets,
            stream=lease.streamed,
            weight=lease.weight,
            prefill_ended=not lease.pending,
            yields=lease.yields,
        )

    def _key(self, name: str) -> int:
        key = self._keys.get(name)
        if key is None:
            if len(self._keys) >= _KEYS_MAX:
                self._keys.clear()
            key = self._keys[name] = notes.replica_key(name)
        return key

    # --- telling -----------------------------------------------------------------------------

    def _add(self, note: bytes) -> None:
        assert self._ring is not None
        now_s = self._clock.now_s()
        self._ring.write(self._origin, now_s, note)
        self._changed = True
        self.sent_total += 1
        if not self._hurry:
            return
        self._count += 1
        if self._timer is None:
            self._first_s = now_s
            loop = asyncio.get_running_loop()
            if not self._busy and now_s - self._told_s > limits.NOTES_FLUSH_S:
                self._timer = loop.call_soon(self._hurried)  # a timer would be one more awakening
                return
            delay_s = limits.NOTES_FLUSH_BUSY_S if self._busy else limits.NOTES_FLUSH_S
            self._timer = loop.call_later(delay_s, self._hurried)

    def _hurried(self) -> None:
        """Have the supervisor read now."""
        self._timer = None
        self._told_s = self._clock.now_s()
        passed_s = self._told_s - self._first_s
        self._busy = self._count > max(passed_s, limits.NOTES_FLUSH_S) * limits.NOTES_BUSY_PER_S
        self._count = 0
        if self._channel is not None:
            self._channel.send(Noted())

    def _tell_regularly(self) -> None:
        """What was lost on a reader had changed something, so it is told within the interval."""
        if self._changed:
            self.tell_all()
        loop = asyncio.get_running_loop()
        self._whole_timer = loop.call_later(limits.NOTES_WHOLE_S, self._tell_regularly)
