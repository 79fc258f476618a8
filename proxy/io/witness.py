"""What engines' KV events are to this proxy: who is followed, what is told of it, how old it is.

It stands between the hub and the follower. What workers and peers decide is overheard from the hub
as long as an engine can be followed, and no longer, so that without events nobody has to speak;
what the events mean is said to our own workers only, since each proxy follows its engines itself.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp

from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot, ReplicaState
from proxy.core import limits, note_wire, notes
from proxy.core.kv_source import KvSource
from proxy.core.note_wire import NoteError
from proxy.core.notes import Note
from proxy.core.prefix import PrefixChain
from proxy.core.replica import replicas_of
from proxy.io.hub import Hub
from proxy.io.kv_events import KvFollower
from proxy.io.kv_reach import Followed
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample

OVERHEARD_BYTES_MAX = 256 * 1024  # that wait to be read

_FOLLOWED = frozenset((ReplicaState.READY, ReplicaState.DRAINING))


class Witness:
    """One for all workers. It begins with `look`."""

    def __init__(self, tasks: Tasks, hub: Hub) -> None:
        self._tasks = tasks
        self._hub = hub
        self._follower: KvFollower | None = None
        self._on = False
        self._snapshot: FleetSnapshot | None = None
        self._servers: dict[str, list[str]] = {}  # names of the replicas followed, by server
        self._names: dict[int, str] = {}  # of those, by key
        self._asleep: frozenset[str] = frozenset()
        self._open: dict[int, set[int]] = {}  # leases overheard and not ended, by origin
        self._overheard: list[tuple[int, float, bytes]] = []  # and not read yet
        self._overheard_bytes = 0
        self._said: list[bytes] = []
        self._said_bytes = 0

    def look(self, session: aiohttp.ClientSession, config: ProxyConfig) -> None:
        """Begin, or go on as `config` says now."""
        configured = None
        if config.kv_events_port:
            replay_port = config.kv_events_replay_port
            replay = f"tcp://*:{replay_port}" if replay_port else ""
            configured = KvSource(f"tcp://*:{config.kv_events_port}", replay, "")
        self._on = config.kv_events == "auto"
        if not self._on:
            self._servers = {}
            self._follow([])
        elif self._follower is not None:
            self._follower.ask_by(session, config.api_key, configured)
        else:
            self._follower = KvFollower(
                self._tasks,
                session,
                on_evicted=self._on_evicted,
                on_cleared=self._on_cleared,
                on_held=self._on_held,
                on_state=self._on_state,
                catch_up=self._catch_up,
                api_key=config.api_key,
                configured=configured,
            )
        if self._snapshot is not None:
            self.know(self._snapshot)

    async def close(self) -> None:
        if self._follower is not None:
            await self._follower.close()

    # --- the fleet ---------------------------------------------------------------------------

    def know(self, snapshot: FleetSnapshot) -> None:
        """These are the replicas now, those left out with which nobody can connect."""
        self._snapshot = snapshot
        if not self._on or self._follower is None:
            return
        followed: list[Followed] = []
        servers: dict[str, list[str]] = {}
        asleep = []
        for record in snapshot.replicas:
            if record.state not in _FOLLOWED:
                continue
            told = None
            if record.kv_events:
                told = KvSource(record.kv_events, record.kv_replay, record.kv_topic)
            for replica in replicas_of(record):
                # One that drains or falls asleep is followed on, so that what it says later is no
                # news; it is not worth the beginning.
                known = self._follower.binding(replica.name) is not None
                if not known and (replica.asleep or record.state is not ReplicaState.READY):
                    continue
                if replica.asleep:
                    asleep.append(replica.name)
                followed.append(
                    Followed(replica.name, record.url, replica.dp_rank, told, replica.restarts)
                )
                servers.setdefault(record.replica_id, []).append(replica.name)
        for name in asleep:
            if name not in self._asleep:
                self._follower.cleared(name)
        self._asleep = frozenset(asleep)
        self._servers = servers
        self._follow(followed)

    def _follow(self, followed: list[Followed]) -> None:
        self._catch_up()
        self._names = {notes.replica_key(replica.name): replica.name for replica in followed}
        if self._follower is not None:
            self._follower.follow(followed)
            self._overhear()

    def _overhear(self) -> None:
        """Have workers speak while there is an engine whose events say something of it."""
        assert self._follower is not None
        if any(state.endpoint for state in self._follower.states()):
            self._hub.overhear(self)
        else:
            self._hub.overhear(None)
            for origin in list(self._open):
                self.gone(origin)

    # --- what passes through the proxies -----------------------------------------------------

    def heard(self, origin: int, at_s: float, batch: bytes) -> None:
        """A worker, ours or a peer's, has said this; its first note was of this moment.

        It is of use when engines' events are read, and is read then, with all else that was heard.
        """
        self._overheard.append((origin, at_s, batch))
        self._overheard_bytes += len(batch)
        if self._overheard_bytes >= OVERHEARD_BYTES_MAX:
            self._read()  # and collect nothing: what is newer would come before the rest of this

    def _catch_up(self) -> None:
        """Read all that was said until now."""
        self._hub.collect()
        self._read()

    def _read(self) -> None:
        """Read what was overheard."""
        overheard, self._overheard, self._overheard_bytes = self._overheard, [], 0
        for origin, at_s, batch in overheard:
            try:
                found = note_wire.read_notes(batch)
            except NoteError as error:
                found = error.before  # those who need it whole say so
            leases = self._open.setdefault(origin, set())
            for note in found:
                self._apply(origin, leases, note, at_s)

    def _apply(self, origin: int, leases: set[int], note: Note, at_s: float) -> None:
        follower = self._follower
        assert follower is not None
        if isinstance(note, notes.Dispatched):
            name = self._names.get(note.lease.replica_key)
            lease_id = note.lease.lease_id
            if name is not None and len(leases) < limits.FOREIGN_LEASES_MAX:
                leases.add(lease_id)
                chain = PrefixChain(0, note.hashes, note.ends, note.lease.prompt_bytes)
                follower.dispatched((origin, lease_id), name, chain, at_s)
        elif isinstance(note, notes.PrefillEnded):
            follower.prefill_ended((origin, note.lease_id), at_s)
        elif isinstance(note, notes.Released):
            leases.discard(note.lease_id)
            follower.released((origin, note.lease_id), note.usage, at_s)
        elif isinstance(note, notes.OpenLeases):
            listed = {lease.lease_id for lease in note.leases}
            for lease_id in [one for one in leases if note.covers(one) and one not in listed]:
                leases.discard(lease_id)  # its end was lost on the way
                follower.released((origin, lease_id), None, at_s)

    def gone(self, origin: int) -> None:
        """That worker is no more."""
        assert self._follower is not None
        self._catch_up()
        now_s = time.monotonic()
        for lease_id in self._open.pop(origin, ()):
            self._follower.released((origin, lease_id), None, now_s)

    # --- what engines tell -------------------------------------------------------------------

    def _on_evicted(self, name: str, hashes: list[int]) -> None:
        key = notes.replica_key(name)
        for start in range(0, len(hashes), limits.NOTE_HASHES_MAX):
            self._say(note_wire.write_evicted(key, hashes[start : start + limits.NOTE_HASHES_MAX]))

    def _on_cleared(self, name: str) -> None:
        self._say(note_wire.write_cleared(notes.replica_key(name)))

    def _on_held(self, name: str, chain: PrefixChain) -> None:
        """Deepest first, as the index has it: what builds on a prefix goes before the prefix."""
        ends = (0, *chain.ends)
        sizes = [ends[depth + 1] - ends[depth] for depth in range(len(chain.hashes))]
        key = notes.replica_key(name)
        self._say(note_wire.write_holds(key, chain.hashes[::-1], sizes[::-1]))

    def _on_state(self, name: str, fresh: bool, resident_tokens: int) -> None:
        state = notes.State(notes.replica_key(name), fresh, resident_tokens, -1, -1.0)
        self._say(note_wire.write_state(state))
        self._overhear()

    def _say(self, note: bytes) -> None:
        """Tell our workers, as one batch what comes at once."""
        if self._said_bytes >= limits.NOTES_BATCH_BYTES_MAX:
            self._flush()
        if not self._said:
            asyncio.get_running_loop().call_soon(self._flush)
        self._said.append(note)
        self._said_bytes += len(note)

    def _flush(self) -> None:
        if self._said:
            self._hub.say(b"".join(self._said))
            self._said.clear()
            self._said_bytes = 0

    # --- what is reported --------------------------------------------------------------------

    @property
    def open_count(self) -> int:
        """Return how many leases were overheard and have not ended."""
        self._catch_up()
        return sum([len(leases) for leases in self._open.values()])

    def samples(self) -> list[Sample]:
        """Return what each server's cache is judged by, and the age of what is known of it."""
        if self._follower is None:
            return []
        fresh = {state.name for state in self._follower.states() if state.fresh}
        out: list[Sample] = []
        for replica_id, names in self._servers.items():
            by = ("replica", replica_id)
            grade = "events" if fresh.issuperset(names) else "record"
            out.append(Sample("replica_cache_source", (by, ("source", grade)), 1))
            age_s = max([self._follower.age_s(name) for name in names])
            if age_s < float("inf"):
                out.append(Sample("replica_cache_source_age_seconds", (by,), age_s))
        return out
