"""Which models a batch may ask for: those of the configuration, and those of the manager's fleet.

A pool at zero, a replica that is down, an adapter that is not loaded: a batch can wait for all of
them, so all of them count. The configuration says most of it; the manager's watch adds what was
reloaded since, and what replicas list. A replica that lists no models may serve any, and with
neither configuration nor manager nothing is known at all: then every name is let through, and the
lines are answered by whoever is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

import aiohttp
import msgspec

from proxy.config import ModelConfig
from proxy.contract import (
    FLEET_WATCH_PATH,
    HEARTBEAT_INTERVAL_S,
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    decode_snapshot,
)

RECONNECT_S = 1.0
CONNECT_TIMEOUT_S = 2.0
SILENCE_S_MAX = 3 * HEARTBEAT_INTERVAL_S


def configured_names(models: Iterable[ModelConfig]) -> frozenset[str]:
    """Return the names that clients may ask for by the configuration."""
    names: set[str] = set()
    for model in models:
        names.add(model.name)
        for pool in model.pools:
            names.update(pool.adapters)
    return frozenset(names)


class KnownModels:
    """Names of models, kept up to date while `follow` runs."""

    def __init__(self, configured: frozenset[str]) -> None:
        self._configured = configured
        self._told: frozenset[str] = frozenset()
        self._any = not configured

    def configure(self, names: frozenset[str]) -> None:
        """Take the names of a configuration that was read anew."""
        self._configured = names
        self._any = not names and not self._told

    def knows(self, name: str) -> bool:
        """Say whether a batch may ask for `name`; MODEL:ADAPTER asks for a model."""
        names = self._configured | self._told
        return self._any or name in names or name.partition(":")[0] in names

    def take(self, snapshot: FleetSnapshot) -> None:
        """Believe what the manager says now."""
        names = {name for replica in snapshot.replicas for name in replica.models}
        self._told = frozenset(names | {pool.model for pool in snapshot.pools})
        nothing_known = not self._configured and not self._told
        self._any = nothing_known or any(not replica.models for replica in snapshot.replicas)

    async def follow(self, manager_url: str) -> None:
        """Watch the manager for ever; while it is away, the last that it said holds."""
        while True:
            with suppress(aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError):
                await self._follow_once(manager_url)
            await asyncio.sleep(RECONNECT_S)

    async def _follow_once(self, manager_url: str) -> None:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S_MAX
        )
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=SNAPSHOT_BYTES_MAX) as session,
            session.get(manager_url + FLEET_WATCH_PATH) as response,
        ):
            response.raise_for_status()
            async for line in response.content:
                if line.strip():
                    self.take(decode_snapshot(line))
