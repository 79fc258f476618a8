"""Which proxies stand behind a name: `dns:NAME:PORT` among the peers is every address of the name.

Where proxies come and go, as the pods of a Deployment do, nobody can list them; a name that has an
address for each (a headless Service, a record with several) can. It is asked again every few
seconds. A name server that does not answer says nothing of the peers, so they stay as they were.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable

from proxy.core import limits, peer_wire
from proxy.io.tasks import Tasks

_log = logging.getLogger("doherty.peers")


class PeerNames:
    """The addresses behind names, followed as long as there are names."""

    def __init__(self, tasks: Tasks, on_change: Callable[[], None]) -> None:
        self._tasks = tasks
        self._on_change = on_change
        self._found: dict[str, tuple[str, ...]] = {}  # by name; empty: none so far
        self._following: asyncio.Task[None] | None = None

    def resolved(self, addresses: Iterable[str]) -> list[str]:
        """Return `addresses` with what is known to stand behind names in the names' place."""
        return [
            each
            for address in addresses
            for each in self._found.get(address, () if peer_wire.is_name(address) else (address,))
        ]

    def know(self, addresses: Iterable[str]) -> None:
        """Follow the names among these, and no others."""
        names = [address for address in addresses if peer_wire.is_name(address)]
        self._found = {name: self._found.get(name, ()) for name in names}
        if names and self._following is None:
            self._following = self._tasks.spawn("peer names", self._follow())
        elif not names and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self) -> None:
        while True:
            for name in list(self._found):
                await self._look(name)
            await asyncio.sleep(limits.PEER_NAMES_INTERVAL_S)

    async def _look(self, name: str) -> None:
        host, port = peer_wire.parse_address(name)
        try:
            async with asyncio.timeout(limits.PEER_HANDSHAKE_TIMEOUT_S):
                told = await asyncio.get_running_loop().getaddrinfo(
                    host, port, type=socket.SOCK_STREAM
                )
        except OSError:  # a timeout is one
            return
        hosts = sorted({str(entry[4][0]) for entry in told})
        found = tuple(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts)
        found = found[: limits.PEER_LINKS_MAX]
        if name in self._found and found != self._found[name]:
            _log.info("peers behind %s: %s", name.removeprefix(peer_wire.NAME), ", ".join(found))
            self._found[name] = found
            self._on_change()
