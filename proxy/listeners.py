"""The listening sockets: opened, taken over from another proxy, or given by systemd.

Every worker has a socket of its own on the one port (SO_REUSEPORT). A socket that is closed resets
the connections that wait in its queue, so a proxy that takes over takes the sockets themselves, and
serves every one of them, however many workers it has: a socket that nobody accepts from would
swallow its share of the clients.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence

import msgspec

from proxy.config import ProxyConfig
from proxy.core import limits

SYSTEMD_FIRST_FD = 3  # sd_listen_fds(3)


PUBLIC, ADMIN = "public", "admin"


class StartError(Exception):
    """The proxy cannot start; the text says what to do."""


class Listeners(msgspec.Struct):
    """All listening sockets of one proxy."""

    public: list[socket.socket]
    admin: list[socket.socket]
    pinned: frozenset[str] = frozenset()  # kinds that stay where they are, whatever is configured
    held: frozenset[str] = frozenset()  # replicas that the proxy before was told to drain

    def close(self) -> None:
        for listener in (*self.public, *self.admin):
            listener.close()


def given_by_systemd(environ: Mapping[str, str]) -> Listeners | None:
    """Return the sockets of a socket unit: those named `admin` for that, the others for clients.

    Raises `StartError`.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    given = Listeners([], [])
    count = environ.get("LISTEN_FDS", "0")
    if not (count.isascii() and count.isdecimal()):
        raise StartError(f"LISTEN_FDS={count!r} is no number; systemd sets it, or nobody")
    for index in range(int(count)):
        listener = _given(SYSTEMD_FIRST_FD + index)
        listener.set_inheritable(False)
        if listener.family != socket.AF_UNIX:
            _notice_slow_readers(listener)
        to_admin = names[index : index + 1] == ["admin"]
        (given.admin if to_admin else given.public).append(listener)
    kinds = ((PUBLIC, given.public), (ADMIN, given.admin))
    given.pinned = frozenset(kind for kind, listeners in kinds if listeners)
    return given


def _given(descriptor: int) -> socket.socket:
    try:
        given = socket.socket(fileno=descriptor)
        listens = given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(_not_listening(descriptor, error.strerror or str(error))) from error
    if given.type != socket.SOCK_STREAM or not listens:
        raise StartError(_not_listening(descriptor, "ListenStream= and Accept=no make one"))
    return given


def _not_listening(descriptor: int, why: str) -> str:
    return f"LISTEN_FDS: descriptor {descriptor} is no listening stream socket: {why}"


def arrange(config: ProxyConfig, found: Listeners | None) -> Listeners:
    """Return the sockets to serve, those `found` among them. Raises `StartError`.

    Sockets that systemd made are wanted where they are. Those that we made are wanted only where
    the configuration still says so: it may have changed since, and this is when that comes true.
    """
    found = found or Listeners([], [])
    public = _wanted(found, PUBLIC, config.host, config.port)
    if PUBLIC not in found.pinned:
        missing = config.workers - len(public)
        public += open_listeners(config.host, config.port, missing, beside=public)
    admin = _wanted(found, ADMIN, config.admin_host, config.admin_port)
    admin = admin or open_admin(config.admin_host, config.admin_port)
    return Listeners(public, admin, found.pinned, found.held)


def deal(listeners: Sequence[socket.socket], workers: int) -> list[list[socket.socket]]:
    """Share the sockets out: each to one worker at least, and one at least to each worker."""
    hands: list[list[socket.socket]] = [[] for _ in range(workers)]
    for index in range(max(len(listeners), workers)):
        hands[index % workers].append(listeners[index % len(listeners)])
    return hands


def open_listeners(
    host: str, port: int, count: int, beside: Sequence[socket.socket] = ()
) -> list[socket.socket]:
    """Open `count` sockets on the same port. Raises `StartError`.

    SO_REUSEPORT would let us share the port with any other program of the same user that sets it;
    so it is first asked for without, to find out whether somebody listens there. Not so where we
    have sockets on it already.
    """
    where = f"{host}:{port}"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        if beside:
            port = beside[0].getsockname()[1]
        elif count > 0:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen(1)
                port = port or probe.getsockname()[1]
        listeners = []
        for _ in range(count):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _notice_slow_readers(listener)
            listener.bind((host, port))
            listeners.append(listener)
    except OSError as error:
        raise StartError(port_problem("proxy", where, "--port", error)) from error
    return listeners


def _notice_slow_readers(listener: socket.socket) -> None:
    """Have what it accepts, which inherits this, take little for a reader that is slow.

    Else the kernel takes megabytes before we, and so its replica, notice that it is slow.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limits.UNSENT_BYTES_MAX)


def open_admin(host: str, port: int) -> list[socket.socket]:
    """Open the admin listener on every address of `host`. Raises `StartError`."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port or listeners[0].getsockname()[1], *address[2:]))
            listener.listen(128)
    except OSError as error:
        where = f"{host}:{port}"
        raise StartError(port_problem("admin listener", where, "--admin-port", error)) from error
    return listeners


def port_problem(what: str, where: str, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{what}: {where} is in use; stop what listens there or choose another with {flag}"
    return f"{what}: cannot listen on {where}: {error.strerror or error}"


def _wanted(found: Listeners, kind: str, host: str, port: int) -> list[socket.socket]:
    """Return those of one kind that are on this address, and close the others."""
    listeners = found.admin if kind == ADMIN else found.public
    if kind in found.pinned:
        return listeners
    try:
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        known = []
    addresses = {entry[4][0] for entry in known}
    wanted = []
    for listener in listeners:
        at_host, at_port = listener.getsockname()[:2]
        if at_host in addresses and port in (0, at_port):
            wanted.append(listener)
        else:
            listener.close()
    return wanted
