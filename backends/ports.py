"""Leases of loopback ports: a port is one replica's at a time.

A replica has several: its HTTP port, and those that its engine needs for KV events, their replay
and its own processes, in runs of consecutive ports, because ranks count on from the first. They
stay its own over restarts, so that what others know of it stays true.

Ports come from below the kernel's range for outgoing connections. An engine takes many seconds from
being told its port to listening on it, and on a busy proxy host thousands of outgoing connections
are made meanwhile; a port out of that range would sooner or later be taken by one of them. What is
left of the risk (a stranger's server) is met by a new port at the next start.

Ports on other machines of a cluster are leased alike, though nobody here can see whether they are
free: so two replicas never meet, whichever machine they get. Who starts them there looks, and each
start takes others.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from pathlib import Path

from backends.engines.base import EVERYWHERE, HOST, UNPLACED, Ports, PortsNeeded

PORT_MIN = 20_000
_PORT_MAX_WANTED = 32_767
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


CELL_PORT = 8000  # of HTTP in a cell; what else is needed follows it


class NoPortError(Exception):
    """Every port of the range is taken."""


class PortLeases:
    """The ports that this manager has given out."""

    def __init__(
        self,
        seed: random.Random,
        port_min: int = PORT_MIN,
        port_max: int | None = None,
        listen: str = HOST,
    ) -> None:
        self.listen = listen
        self._here = listen == HOST
        self._seed = seed
        self._port_min = port_min
        self._port_max = port_max or max(port_min, min(_PORT_MAX_WANTED, _ephemeral_min() - 1))
        self._leased: set[int] = set()

    def lease(self, count: int = 1) -> int:
        """Return the first of `count` ports that are free now and leased to nobody.

        The walk starts anywhere, so that two managers on a host rarely meet. Raises `NoPortError`.
        """
        starts = self._port_max - self._port_min + 2 - count
        begin = self._seed.randrange(starts) if starts > 0 else 0
        for offset in range(starts):
            first = self._port_min + (begin + offset) % starts
            run = range(first, first + count)
            if self._leased.isdisjoint(run) and self._all_free(run):
                self._leased.update(run)
                return first
        some = "free port" if count == 1 else f"{count} free ports in a row"
        where = f" on {HOST}" if self._here else ""
        raise NoPortError(f"no {some}{where} in {self._port_min}-{self._port_max}")

    def keep_or_lease(self, first: int, count: int = 1) -> int:
        """Return `first`, leased before, unless somebody listens there now; then another one.

        Whoever listens would answer the readiness probe in the place of the engine.
        """
        if first and self._here and self._all_free(range(first, first + count)):
            return first
        fresh = self.lease(count)
        self.release(first, count)
        return fresh

    def claim(self, first: int, count: int = 1) -> None:
        """Take the ports of a process that already listens on them."""
        self._leased.update(range(first, first + count))

    def release(self, first: int, count: int = 1) -> None:
        self._leased.difference_update(range(first, first + count))

    def _all_free(self, run: range) -> bool:
        return not self._here or all(port_free(HOST, port) for port in run)


class ReplicaPorts:
    """The leases of one replica."""

    def __init__(self, leases: PortLeases) -> None:
        self._leases = leases
        self.runs: dict[str, tuple[int, int]] = {}  # what for: the first, and how many

    @property
    def http(self) -> int:
        """Return the port that it listens on; 0 before the first start."""
        return self.runs.get("http", (0, 0))[0]

    def take_http(self) -> None:
        """Have an address to be published by, before it is known what else is needed.

        Raises `NoPortError`.
        """
        self.runs["http"] = (self._leases.keep_or_lease(self.http), 1)

    def take(self, needed: PortsNeeded) -> Ports:
        """Return what the next start gets: the ports of the last one where they still do.

        Raises `NoPortError`.
        """
        wanted = {"http": 1} | needed._asdict()
        for kind, count in wanted.items():
            first, held = self.runs.get(kind, (0, 0))
            if held != count:
                self._leases.release(first, held)
                self.runs.pop(kind, None)
                first = 0
            if count:
                self.runs[kind] = (self._leases.keep_or_lease(first, count), count)
        firsts = {kind: first for kind, (first, _) in self.runs.items()}
        events, replay, internal = (firsts.get(kind, 0) for kind in PortsNeeded._fields)
        return Ports(firsts["http"], events, replay, internal, self._leases.listen)

    @property
    def host(self) -> str:
        """Return where what is started now is reached."""
        return HOST if self._leases.listen == HOST else UNPLACED

    def claim(self, host: str, runs: Mapping[str, tuple[int, int]]) -> None:
        """Take over those of a process that runs at `host`; in a cell they are its own."""
        if host != HOST and self._leases.listen == HOST:
            return
        for first, count in runs.values():
            self._leases.claim(first, count)
        self.runs = dict(runs)

    def release(self) -> None:
        for first, count in self.runs.values():
            self._leases.release(first, count)
        self.runs = {}


def cell_ports(needed: PortsNeeded) -> Ports:
    """Return the ports of a replica that has a network of its own: the same in each.

    A copy of it listens where the one listened that was dumped, so nothing here may be luck.
    """
    events = CELL_PORT + 1
    replay = events + needed.kv_events
    internal = replay + needed.kv_replay
    return Ports(
        CELL_PORT,
        events if needed.kv_events else 0,
        replay if needed.kv_replay else 0,
        internal if needed.internal else 0,
        EVERYWHERE,
    )


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
