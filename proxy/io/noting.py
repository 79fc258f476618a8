"""A worker's decisions, told to the others: at once, or collected for a moment and then as a batch.

A batch costs the three processes that it passes through as much as several requests do: so between
two of them some time passes, and for a worker that decides much more of it. With nobody listening
it costs its caller one test of `on`. A supervisor that does not keep up loses notes and not this
worker's time: what it missed is told again as a whole, as all that is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from proxy.core import limits, note_wire, notes
from proxy.core.lease import Lease
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
        self.dropped_total = 0
        self._clock = clock
        self._picture = picture
        self._leases = leases
        self._channel: Channel | None = None
        self._keys: dict[str, int] = {}
        self._parts: list[bytes] = []
        self._bytes = 0
        self._first_s = 0.0
        self._busy = False  # the last batch filled up fast
        self._sent_s = 0.0  # when the last batch was sent
        self._changed = False  # since all was told
        self._timer: asyncio.Handle | None = None
        self._whole_timer: asyncio.TimerHandle | None = None

    def connect(self, channel: Channel) -> None:
        self._channel = channel

    def listen(self, *, on: bool) -> None:
        """Begin to tell, with all that is open, or stop."""
        if on == self.on or self._channel is None:
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
        self._parts.clear()
        self._bytes = 0

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
        """Tell all that is open, after what was collected; and of prefixes when they are used."""
        self._flush()
        self._picture.index.renew()
        if not self.on:
            return
        leases = [self._open(lease) for lease in self._leases.values()]
        next_id = (self._picture.last_lease_id + 1) % notes.IDS
        for note in note_wire.write_open_leases(leases, next_id):
            self._add(note)
        self._flush()
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

    # --- sending -----------------------------------------------------------------------------

    def _add(self, note: bytes) -> None:
        self._changed = True
        self._parts.append(note)
        self._bytes += len(note)
        if self._timer is None:
            self._first_s = self._clock.now_s()
            loop = asyncio.get_running_loop()
            if not self._busy and self._first_s - self._sent_s > limits.NOTES_FLUSH_S:
                self._timer = loop.call_soon(self._flush)  # a timer would be one more awakening
                return
            delay_s = limits.NOTES_FLUSH_BUSY_S if self._busy else limits.NOTES_FLUSH_S
            self._timer = loop.call_later(delay_s, self._flush)
        elif self._bytes >= limits.NOTES_BATCH_BYTES_MAX:
            self._flush()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        channel = self._channel
        if not self._parts or channel is None:
            return
        count = len(self._parts)
        self._sent_s = self._clock.now_s()
        passed_s = self._sent_s - self._first_s
        self._busy = count > max(passed_s, limits.NOTES_FLUSH_S) * limits.NOTES_BUSY_PER_S
        if channel.waiting_bytes > limits.NOTES_WAITING_BYTES_MAX:
            self.dropped_total += count
        else:
            self.sent_total += count
            channel.send(Noted(self._first_s, b"".join(self._parts)))
        self._parts = []
        self._bytes = 0

    def _tell_regularly(self) -> None:
        """What was dropped had changed something, so it is told again within the interval."""
        if self._changed:
            dropped_total = self.dropped_total
            self.tell_all()
            self._changed = self.dropped_total != dropped_total
        loop = asyncio.get_running_loop()
        self._whole_timer = loop.call_later(limits.NOTES_WHOLE_S, self._tell_regularly)
