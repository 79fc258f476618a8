"""Follows what engines tell of their KV caches. Runs in the supervisor, once for all workers.

For each replica, or rank of one: find where its events are, subscribe, have told again what was
said before, and hand each batch to `core.binding`, which says what it means for the chains that the
proxy knows. A hole in the numbers is asked for again; what cannot be had again, or not be read,
makes the tree of that engine start anew, because a removal may have been in it. An engine that is
silent is asked whether it has said anything, so that silence and a broken connection are not taken
for each other.

Nothing here is needed to serve: while a source is not fresh, its replica is judged by the proxy's
own record of what it sent there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import aiohttp
import zmq

from proxy.core import limits
from proxy.core.binding import KvBinding
from proxy.core.kv_source import KvSource
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage
from proxy.io.kv_reach import Followed, Reach
from proxy.io.kv_replay import Room
from proxy.io.kv_sockets import Socket
from proxy.io.kv_stream import KvStream, SourceState
from proxy.io.tasks import Tasks, beat


class KvFollower:
    """All replicas whose events are followed, and what passes through the proxy to them."""

    def __init__(
        self,
        tasks: Tasks,
        session: aiohttp.ClientSession,
        *,
        on_evicted: Callable[[str, list[int]], None],
        on_cleared: Callable[[str], None],
        on_held: Callable[[str, PrefixChain], None],
        on_state: Callable[[str, bool, int], None],
        catch_up: Callable[[], None] = lambda: None,
        api_key: str | None = None,
        configured: KvSource | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`configured` is for engines that do not say where their events are: what they were
        started with, such as `tcp://*:5557`. Times of facts are of the clock `now_s`.

        `on_held(name, chain)` takes back, of a request under way, what was told as gone.
        `catch_up()` tells all that has passed through the proxy so far: before events are read.
        """
        self._tasks = tasks
        self._context: zmq.Context[Socket] = zmq.Context()
        self._room = Room()
        self._reach = Reach(session, api_key, configured)
        self._on_evicted = on_evicted
        self._on_cleared = on_cleared
        self._on_held = on_held
        self._on_state = on_state
        self._catch_up = catch_up
        self._now_s = now_s
        self._streams: dict[str, KvStream] = {}
        self._names: dict[Hashable, str] = {}  # of requests under way
        self._ticker: asyncio.Task[Any] | None = None

    def ask_by(
        self, session: aiohttp.ClientSession, api_key: str | None, configured: KvSource | None
    ) -> None:
        """Ask engines so from now on."""
        self._reach.ask_by(session, api_key, configured)

    async def close(self) -> None:
        """End all that was begun here."""
        ending = [stream.task for stream in self._streams.values()]
        if self._ticker is not None:
            ending.append(self._ticker)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._streams.clear()
        self._context.destroy(linger=0)

    def follow(self, replicas: Iterable[Followed]) -> None:
        """Follow these replicas and no others."""
        wanted = {replica.name: replica for replica in replicas}
        for name, stream in list(self._streams.items()):
            new = wanted.get(name)
            if new is None or new[:4] != stream.followed[:4]:
                stream.task.cancel()
                del self._streams[name]
            elif new.restarts != stream.followed.restarts:
                stream.followed = new
                self.cleared(name)
        for name, replica in wanted.items():
            if name not in self._streams:
                self._streams[name] = self._start(replica)
        count = max(1, len(self._streams))
        blocks_max = min(limits.KV_BLOCKS_MAX, limits.KV_BLOCKS_TOTAL_MAX // count)
        points_max = min(limits.KV_POINTS_MAX, limits.KV_POINTS_TOTAL_MAX // count)
        for stream in self._streams.values():
            stream.binding.limit(blocks_max, points_max)
        if self._streams and self._ticker is None:
            self._ticker = self._tasks.spawn("kv ticks", self._tick())

    def _start(self, replica: Followed) -> KvStream:
        stream = KvStream(
            replica,
            self._context,
            self._reach,
            self._room,
            on_evicted=self._evicted,
            on_cleared=self._emptied,
            catch_up=self._catch_up,
            now_s=self._now_s,
        )
        stream.task = self._tasks.spawn(f"kv events {replica.name}", stream.run())
        return stream

    def _evicted(self, name: str, hashes: list[int]) -> None:
        if hashes:
            told = self._streams[name].underway.evicted(hashes, self._now_s())
            if told:
                self._on_evicted(name, told)

    def _emptied(self, name: str) -> None:
        self._on_cleared(name)
        for chain in self._streams[name].underway.cleared(self._now_s()):
            self._on_held(name, chain)

    # --- what passes through the proxy -----------------------------------------------------

    def dispatched(self, key: Hashable, name: str, chain: PrefixChain, at_s: float) -> None:
        """A request was sent. `key` names it until it is released."""
        stream = self._streams.get(name)
        if stream is None:
            return
        if len(self._names) >= limits.KV_OPEN_MAX:
            del self._names[next(iter(self._names))]
        self._names[key] = name
        stream.binding.dispatched(key, chain, at_s)
        if stream.underway.dispatched(key, chain, at_s, self._now_s()):
            self._on_held(name, chain)

    def prefill_ended(self, key: Hashable, at_s: float) -> None:
        """The first octet of its answer came."""
        stream = self._streams.get(self._names.get(key, ""))
        if stream is not None:
            stream.binding.prefill_ended(key, at_s)

    def released(self, key: Hashable, usage: Usage | None, at_s: float) -> None:
        """It has ended, with these counts if the engine gave any."""
        stream = self._streams.get(self._names.pop(key, ""))
        if stream is not None:
            stream.binding.released(key, usage, at_s)
            stream.underway.released(key, self._now_s())

    def cleared(self, name: str) -> None:
        """The manager put the engine to sleep, reset its cache or started it anew: it is empty.

        The engine's own word comes with its next step, and is no news then.
        """
        self._catch_up()
        stream = self._streams.get(name)
        if stream is not None:
            stream.binding.drop(self._now_s())
            self._on_cleared(name)

    # --- what is known of it ---------------------------------------------------------------

    def states(self) -> list[SourceState]:
        return [stream.state for stream in self._streams.values()]

    def binding(self, name: str) -> KvBinding | None:
        stream = self._streams.get(name)
        return None if stream is None else stream.binding

    def age_s(self, name: str) -> float:
        """Return for how long nothing was heard of a source; infinite, when nothing ever was."""
        stream = self._streams.get(name)
        if stream is None or not stream.state.heard_s:
            return float("inf")
        return self._now_s() - stream.state.heard_s

    async def _tick(self) -> None:
        while True:
            await beat(limits.KV_GATHER_S)
            self._catch_up()
            now_s = self._now_s()
            for name, stream in self._streams.items():
                self._evicted(name, stream.binding.advance(now_s))
                stream.judge(now_s)
                if stream.report_due(now_s):
                    self._on_state(name, stream.state.fresh, stream.binding.resident_tokens)
