"""What the supervisor asks the world outside: who the replicas are, whether suspects are well,
which API keys there are, and by which an identity provider signs. No fleet is told before API keys
are known.

All of it, the provider aside, goes through one HTTP client that speaks TLS as the data path does.
The configuration may change at any time; what is known of replicas that remain, suspects among
them, stays known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from proxy import tls
from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot
from proxy.contract.keys import KeySet
from proxy.io.health import Prober
from proxy.io.jwt_keys import JwtKeys
from proxy.io.keyring import Keyring
from proxy.io.registry import ManagerWatch, OnSnapshot, StaticList
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample


class Lookout:
    """The fleet's source and the prober, until closed."""

    def __init__(
        self,
        tasks: Tasks,
        *,
        on_snapshot: OnSnapshot,
        on_cleared: Callable[[str], None],
        on_silent: Callable[[str], None],
        on_keys: Callable[[KeySet], None],
        on_jwt_keys: Callable[[bytes], None],
    ) -> None:
        self._tasks = tasks
        self._on_snapshot = on_snapshot
        self._on_cleared = on_cleared
        self._on_silent = on_silent
        self._session: aiohttp.ClientSession | None = None
        self._old_sessions: set[aiohttp.ClientSession] = set()
        self._static: StaticList | None = None
        self._manager: ManagerWatch | None = None
        self._following: asyncio.Task[None] | None = None
        self._held_back: FleetSnapshot | None = None
        self.keyring = Keyring(tasks, on_keys, self._keys_known)
        self.jwt_keys = JwtKeys(tasks, on_jwt_keys)
        self.prober = Prober(tasks, on_cleared=on_cleared, on_silent=on_silent)

    @property
    def session(self) -> aiohttp.ClientSession:
        """The client by which engines are asked now; another one after the next `look`."""
        assert self._session is not None
        return self._session

    def look(self, config: ProxyConfig) -> None:
        """Begin, or go on as `config` says now."""
        if self._session is not None:
            # What is being asked through it may end first: a broken probe would accuse a replica.
            self._old_sessions.add(self._session)
            self._tasks.start(
                "old session", self._retire(self._session, config.health_check_timeout_secs)
            )
        connector = aiohttp.TCPConnector(ssl=tls.replica_context(config))
        self._session = session = aiohttp.ClientSession(connector=connector)
        self.prober.ask_by(
            session,
            endpoint=config.health_check_endpoint,
            interval_s=config.health_check_interval_secs,
            timeout_s=config.health_check_timeout_secs,
        )
        self.keyring.look(config, session)
        self.jwt_keys.look(config.access.jwt)
        if self._following is not None:
            self._following.cancel()
        self._following = self._tasks.spawn("fleet", self._source(config).run(self._hear))

    def silence_s(self) -> float:
        """Return for how long its source has said nothing of the fleet; a list is always there."""
        return self._manager.silence_s() if self._manager is not None else 0.0

    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of what is known of keys, suspects and the manager."""
        counters, gauges = self.keyring.samples()
        failed, aged = self.jwt_keys.samples()
        suspicions = Sample("suspicions_total", (), self.prober.suspicions_total)
        if self._manager is not None:
            aged = [*aged, Sample("manager_silence_seconds", (), self._manager.silence_s())]
        return [*counters, *failed, suspicions], [*gauges, *aged]

    def _hear(self, snapshot: FleetSnapshot) -> None:
        if self.keyring.known:
            self._on_snapshot(snapshot)
        else:
            self._held_back = snapshot

    def _keys_known(self) -> None:
        snapshot, self._held_back = self._held_back, None
        if snapshot is not None:
            self._on_snapshot(snapshot)

    def _source(self, config: ProxyConfig) -> StaticList | ManagerWatch:
        if config.manager_url:
            self._static = None
            before = self._manager
            self._manager = ManagerWatch(config.manager_url, self.session)
            if before is not None:
                self._manager.heard_s = before.heard_s
            return self._manager
        self._manager = None
        known = self._static.records if self._static is not None else {}
        version = self._static.version if self._static is not None else 0
        self._static = StaticList(
            config.worker_urls,
            self.session,
            config.api_key,
            known=known,
            version=version,
            scrape_interval_s=config.scrape_interval_secs,
        )
        return self._static

    async def _retire(self, session: aiohttp.ClientSession, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._old_sessions.discard(session)
        await session.close()

    async def close(self) -> None:
        for session in (*self._old_sessions, self._session):
            if session is not None:
                await session.close()
