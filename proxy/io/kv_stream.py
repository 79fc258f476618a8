"""One engine's KV events, from its sockets to the tree of its blocks.

The socket that publishes may drop, and begins when we come; what is missing is had from the one
that replays. Each replay begins with the last batch that we have, so that a source which is not the
same any more is noticed. A connection that breaks keeps what is known until the engine, found
again, says whether it is still the one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from proxy.core import limits
from proxy.core.binding import KvBinding
from proxy.core.kv_source import KvSequence, KvSource, Verdict
from proxy.core.kv_underway import Underway
from proxy.core.kv_wire import BadBatchError, Batch, Frames, read_batch, read_frames
from proxy.io import kv_sockets
from proxy.io.kv_reach import Followed, LostError, Reach
from proxy.io.kv_replay import Room, replayed
from proxy.io.kv_sockets import Socket
from proxy.io.tasks import beat

_log = logging.getLogger("doherty.kv_events")

RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
# An engine without events is asked again now and then: it may have been started anew with them.
NO_SOURCE_RETRY_S = 30.0
CONNECT_TIMEOUT_S = 5.0
IDLE_CHECK_S = 2.0
# Silent, and a check is not answered: what the source last said is no longer taken for the truth.
STALE_AFTER_S = 3.0
REPORT_S = 1.0
BATCHES_AT_ONCE = 16  # between two of these, and two of those, others have their turn
EVENTS_AT_ONCE = 128  # of some tens of blocks at the most, mostly
LATENESS_WINDOW_S = 60.0


@dataclass
class SourceState:
    """What an operator may want to know of one source."""

    name: str
    endpoint: str = ""
    fresh: bool = False
    heard_s: float = 0.0  # of the last batch, or of a check that found nothing new
    reason: str = "its events have not been found yet"
    batches: int = 0
    bad_batches: int = 0
    gaps: int = 0
    replays: int = 0
    rebuilds: int = 0  # the tree was started anew
    restarts: int = 0  # the engine was

    @property
    def grade(self) -> str:
        """What this replica's cache is judged by."""
        return "events" if self.fresh else "record"


class _Lateness:
    """How much later than the quickest batches one comes: the engine's clock is not ours."""

    def __init__(self) -> None:
        self._least_s = self._least_before_s = float("inf")
        self._since_s = 0.0

    def of(self, at_s: float, now_s: float, unix_s: float) -> float:
        passed_s = unix_s - at_s
        if now_s - self._since_s > LATENESS_WINDOW_S:
            self._since_s, self._least_before_s = now_s, self._least_s
            self._least_s = passed_s
        self._least_s = min(self._least_s, passed_s)
        return passed_s - min(self._least_s, self._least_before_s)


class KvStream:
    """One replica's, or rank's, events."""

    task: asyncio.Task[Any]

    def __init__(
        self,
        followed: Followed,
        context: zmq.Context[Socket],
        reach: Reach,
        room: Room,
        *,
        on_evicted: Callable[[str, list[int]], None],
        on_cleared: Callable[[str], None],
        catch_up: Callable[[], None],
        now_s: Callable[[], float],
    ) -> None:
        self.followed = followed
        self.state = SourceState(followed.name)
        self.binding = KvBinding(now_s())
        self._context = context
        self._reach = reach
        self._room = room
        self.underway = Underway()
        self._on_evicted = on_evicted
        self._on_cleared = on_cleared
        self._hear_requests = catch_up
        self._now_s = now_s
        self._sequence = KvSequence()
        self._lateness = _Lateness()
        self._applied_s = 0.0  # when what was told last had happened
        self._in_step = False  # nothing that the engine said is missing
        self._reported: tuple[bool, int, float] = (False, 0, 0.0)
        self._reported_s = 0.0

    # --- how good it is --------------------------------------------------------------------

    def judge(self, now_s: float) -> None:
        self.state.fresh = self._in_step and now_s - self.state.heard_s < STALE_AFTER_S

    def report_due(self, now_s: float) -> bool:
        """Say whether the state is news: at once when it is another, else once in a while."""
        seen = (self.state.fresh, self.binding.resident_tokens, self.state.heard_s)
        if not seen[0] and seen[:2] == self._reported[:2]:
            return False  # that it is still not known is none
        if seen == self._reported:
            return False
        if seen[0] == self._reported[0] and now_s // REPORT_S == self._reported_s // REPORT_S:
            return False  # all at the same moments
        self._reported, self._reported_s = seen, now_s
        return True

    def _heard(self) -> None:
        self.state.heard_s = self._now_s()
        self._in_step = True
        self.state.reason = ""

    def _lost(self, reason: str) -> None:
        if self.state.reason != reason:
            _log.info("KV events of %s: %s", self.state.name, reason)
        self._in_step = False
        self.state.reason = reason

    # --- the connection --------------------------------------------------------------------

    async def run(self) -> None:
        """Find, follow, and find again whenever it breaks, until cancelled."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                source = await self._reach.find(self.followed)
                self.state.endpoint = source.endpoint if source is not None else ""
                if source is None:
                    self._lost("the engine publishes none that could be followed")
                    pause_s = NO_SOURCE_RETRY_S
                else:
                    pause_s = RETRY_FIRST_S
                    await self._follow(source)
            except LostError as error:
                self._lost(str(error))
            except ValueError as error:  # what it says makes no sense, and soon will not
                self._lost(str(error))
                pause_s = NO_SOURCE_RETRY_S
            except zmq.ZMQError as error:
                self._lost(f"its sockets cannot be used ({error})")
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_MAX_S, pause_s * 2)

    async def _follow(self, source: KvSource) -> None:
        """Follow one source. Raises `LostError` when the connection is."""
        subscriber = kv_sockets.opened(self._context, zmq.SUB)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor = subscriber.get_monitor_socket(events)
        try:
            subscriber.subscribe(source.topic.encode())
            subscriber.connect(source.endpoint)
            await self._handshake(source, monitor)
            await self._catch_up(source)
            await self._listen(source, subscriber, monitor)
        finally:
            subscriber.disable_monitor()
            monitor.close(linger=0)
            subscriber.close(linger=0)

    @staticmethod
    async def _handshake(source: KvSource, monitor: Socket) -> None:
        """Wait until there is a publisher, so that none of what it says from now on is missed."""
        if not await kv_sockets.arrival(CONNECT_TIMEOUT_S, monitor):
            raise LostError(f"nothing answers at {source.endpoint}")
        if recv_monitor_message(monitor)["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            raise LostError(f"nothing that publishes is at {source.endpoint}")

    async def _listen(self, source: KvSource, subscriber: Socket, monitor: Socket) -> None:
        checked_s = self._now_s()
        while True:
            await beat(limits.KV_GATHER_S)
            self._hear_requests()
            count = 0
            while (frames := kv_sockets.take(subscriber)) is not None:
                await self._take(source, frames)
                count += 1
                if count % BATCHES_AT_ONCE == 0:
                    await asyncio.sleep(0)
            if kv_sockets.has_message(monitor):
                raise LostError("the connection broke")
            if count:
                checked_s = self._now_s()
            elif self._now_s() - checked_s > IDLE_CHECK_S:
                await self._check_idle(source)
                checked_s = self._now_s()

    async def _check_idle(self, source: KvSource) -> None:
        """Nothing came for a while: see that there was nothing to come."""
        if source.replay:
            await self._catch_up(source)
        elif await self._reach.still(self.followed, source):
            self._heard()
        else:
            raise LostError("its events are elsewhere now")

    # --- what comes ------------------------------------------------------------------------

    async def _take(self, source: KvSource, frames: list[bytes]) -> None:
        """Take one published message."""
        read = self._read(frames)
        if read is None:
            return
        number, batch = read
        verdict = self._sequence.judge(number, batch.at_s)
        if verdict in (Verdict.GAP, Verdict.RESTARTED):
            if verdict is Verdict.GAP:
                self.state.gaps += 1
            else:
                self._restarted()
            await self._catch_up(source)
            verdict = self._sequence.judge(number, batch.at_s)
        if verdict is Verdict.REPEATED:
            return
        if verdict is not Verdict.NEXT:
            self._rebuild(f"batch {self._sequence.expected} is not to be had again")
            self._sequence.begin()
        now_s = self._now_s()
        late_s = self._lateness.of(batch.at_s, now_s, time.time())
        await self._apply(number, batch, now_s - late_s, silent=False)
        if late_s > limits.KV_LATE_S * 0.75:  # some of what it was about may be settled
            self.binding.blind(self._now_s())
        self._heard()

    def _read(self, frames: list[bytes]) -> tuple[int, Batch] | None:
        """Return number and batch; None when it cannot be read, and then what it said is lost."""
        told: Frames | None = None
        try:
            told = read_frames(frames)
            return told.number, read_batch(told.payload)
        except BadBatchError as error:
            self.state.bad_batches += 1
            if told is None:  # a batch without a number is missed by the next one's
                self._lost(f"a message cannot be read: {error}")
            elif told.number >= self._sequence.expected:
                self._rebuild(f"batch {told.number} cannot be read: {error}")
                self._sequence.take(told.number, self._sequence.last_at_s)
            return None

    async def _apply(self, number: int, batch: Batch, at_s: float, *, silent: bool) -> None:
        """Take what a batch tells, and has told at `at_s`. In silence, it is of the past."""
        self._sequence.take(number, batch.at_s)
        self.state.batches += 1
        at_s = self._applied_s = max(at_s, self._applied_s)  # growths are in order of time
        for begin in range(0, max(1, len(batch.events)), EVENTS_AT_ONCE):
            if begin:
                await asyncio.sleep(0)
            told = self.binding.apply(batch.events[begin : begin + EVENTS_AT_ONCE], at_s)
            if told.cleared and not silent:
                self._on_cleared(self.state.name)
            if told.evicted:
                self._on_evicted(self.state.name, told.evicted)

    def _rebuild(self, reason: str) -> None:
        """Something is missing, and it may have been a removal: nothing is known any more."""
        self._lost(reason)
        self.state.rebuilds += 1
        self.binding.drop(self._now_s())

    def _restarted(self) -> None:
        """The engine is another one than before, and its cache is empty."""
        _log.info("KV events of %s: the engine was started anew", self.state.name)
        self.state.restarts += 1
        self.binding.drop(self._now_s())
        self._sequence.begin()
        self._on_cleared(self.state.name)

    # --- what came before ------------------------------------------------------------------

    async def _catch_up(self, source: KvSource) -> None:
        """Have what is missing told again. Raises `LostError` when nothing answers."""
        if not source.replay:
            if self._sequence.expected >= 0:
                self._rebuild("what was missed cannot be had again: there is no replay")
                self._sequence.begin()
            self._heard()
            return
        verdict = await self._replay(source.replay)
        if verdict is Verdict.RESTARTED:
            self._restarted()
        elif verdict is Verdict.GAP:
            self._rebuild(f"batch {self._sequence.expected} is not to be had again")
            self._sequence.begin()
        if verdict is not Verdict.NEXT:
            await self._replay(source.replay)
        self._heard()

    async def _replay(self, endpoint: str) -> Verdict:
        """Ask for what is missing and take it; NEXT, when the story is whole after it."""
        self.state.replays += 1
        anew = self._sequence.expected <= 0
        before = self.state.batches
        taken = 0
        told = replayed(
            self._context, endpoint, self._sequence.replay_from, self._room if anew else None
        )
        async with aclosing(told):
            async for frames in told:
                taken += 1
                if taken % BATCHES_AT_ONCE == 0:
                    await asyncio.sleep(0)
                read = self._read(frames)
                if read is not None:
                    verdict = await self._take_again(*read, first=taken == 1, anew=anew)
                    if verdict not in (Verdict.NEXT, Verdict.REPEATED):
                        return verdict
        if self.state.batches > before:  # when that happened is not known
            self.binding.blind(self._now_s())
        if not taken:
            if self._sequence.expected > 0:
                return Verdict.RESTARTED  # it does not know what it had said
            self._sequence.begin_at_nothing()
        return Verdict.NEXT

    async def _take_again(self, number: int, batch: Batch, *, first: bool, anew: bool) -> Verdict:
        """Take one batch of a replay."""
        if first:
            verdict = self._sequence.judge_first_replayed(number, batch.at_s)
        else:
            verdict = self._sequence.judge(number, batch.at_s)
        if verdict is Verdict.NEXT:
            await self._apply(number, batch, self._now_s(), silent=anew)
        return verdict
