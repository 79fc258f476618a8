"""Leases of loopback ports: a port is one replica's at a time.

Ports come from below the kernel's range for outgoing connections. An engine takes many seconds from
being told its port to listening on it, and on a busy proxy host thousands of outgoing connections
are made meanwhile; a port out of that range would sooner or later be taken by one of them. What is
left of the risk (a stranger's server) is met by a new port at the next start.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from backends.engines.base import HOST

PORT_MIN = 20_000
_PORT_MAX_WANTED = 32_767
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class NoPortError(Exception):
    """Every port of the range is taken."""


class PortLeases:
    """The ports that this manager has given out."""

    def __init__(
        self, seed: random.Random, port_min: int = PORT_MIN, port_max: int | None = None
    ) -> None:
        self._seed = seed
        self._port_min = port_min
        self._port_max = port_max or max(port_min, min(_PORT_MAX_WANTED, _ephemeral_min() - 1))
        self._leased: set[int] = set()

    def lease(self) -> int:
        """Return a port that is free now and leased to nobody. Raises `NoPortError`.

        The walk starts anywhere, so that two managers on a host rarely meet.
        """
        count = self._port_max - self._port_min + 1
        start = self._seed.randrange(count)
        for offset in range(count):
            port = self._port_min + (start + offset) % count
            if port not in self._leased and port_free(HOST, port):
                self._leased.add(port)
                return port
        raise NoPortError(f"no free port on {HOST} in {self._port_min}-{self._port_max}")

    def keep_or_lease(self, port: int) -> int:
        """Return `port`, leased before, unless somebody listens there now; then another one.

        Whoever listens would answer the readiness probe in the place of the engine.
        """
        if port and port_free(HOST, port):
            return port
        fresh = self.lease()
        self.release(port)
        return fresh

    def claim(self, port: int) -> None:
        """Take the port of a process that already listens on it."""
        self._leased.add(port)

    def release(self, port: int) -> None:
        self._leased.discard(port)


def port_free(host: str, port: int) -> bool:
    """Say whether a server could listen on `port` now."""
    return bind_problem(host, port) is None


def bind_problem(host: str, port: int) -> OSError | None:
    """Return why nobody can listen on `port` now; None when somebody can.

    SO_REUSEADDR as servers set it: connections that linger in TIME_WAIT do not matter.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _ephemeral_min() -> int:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _PORT_MAX_WANTED + 1
