"""How a new proxy takes the place of a running one, over one unix socket, without losing a request.

    new → old   connects (or was started with the other end of a socket pair)
    old → new   every listening socket (SCM_RIGHTS, unix(7)), in a few messages, then an empty one
    new         starts its workers; they get ready and take nothing yet
    new → old   READY, with one end of a link between the two (`proxy.io.peers`), and lets its
                workers take connections
    old → new   LEFT: it accepts no more, and finishes what it has

A side that goes away before READY changes nothing: the old one goes on as if nobody had come, and
the new one has answered nobody. From READY on both hold the sockets, so the queues of connections
that nobody has accepted yet outlive the old process. Only the owner of the old process, or root,
is given the sockets (SO_PEERCRED).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

import msgspec

from proxy.compile import PACKAGE
from proxy.listeners import ADMIN, PUBLIC, Listeners, StartError

_log = logging.getLogger("doherty.proxy")

DESCRIPTOR_VARIABLE = "DOHERTY_TAKEOVER_FD"
READY, LEFT = b"ready", b"left"
SOCKETS_PER_MESSAGE = 64
MESSAGE_BYTES_MAX = 4096
# The old one may be busy; but whoever starts the new one wants to know before long.
ANSWER_TIMEOUT_S = 10.0
# From the sockets to READY a successor starts its workers, which takes a second or two, or ten on a
# machine that is busy. One that is silent for this long hangs, and holds up whoever comes next.
READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0  # a successor that failed cleans up; that is more than it needs
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def successor_environment(fd: int) -> dict[str, str]:
    """Return the environment of a successor that is given the other end as `fd`.

    What is installed is found there, as it is installed now. Sources that were found because we
    were started in their folder are named, since a successor does not look in its working folder.
    """
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    root = str(PACKAGE.parent)
    if sys.path[:1] == [root] and root not in paths:
        paths.insert(0, root)
    named = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    return {**os.environ, **named, DESCRIPTOR_VARIABLE: str(fd)}


class Handed(msgspec.Struct, frozen=True):
    """What the sockets of one message are for; none in the last message."""

    kinds: list[str]
    pinned: list[str] = []
    held: list[str] = []  # replicas that an operator drains, as many as fit


class Predecessor:
    """The running proxy, as the new one sees it. It is asked before there is an event loop."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @classmethod
    def at(cls, path: str) -> Predecessor:
        """Connect to the proxy that waits at `path`. Raises `StartError`."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            end.settimeout(ANSWER_TIMEOUT_S)
            end.connect(path)
        except OSError as error:
            end.close()
            raise StartError(
                f"no proxy to take over at {path}: {error.strerror or error}; "
                "it must run with --upgrade-socket"
            ) from error
        return cls(end)

    def receive(self) -> Listeners:
        """Take its listening sockets. Raises `StartError`."""
        self._end.settimeout(ANSWER_TIMEOUT_S)
        try:
            return self._receive()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._end.close()
            raise StartError(
                f"the running proxy does not hand over ({error}); its log says why"
            ) from error

    def _receive(self) -> Listeners:
        listeners = Listeners([], [])
        ancillary_bytes = socket.CMSG_SPACE(SOCKETS_PER_MESSAGE * struct.calcsize("i"))
        while True:
            message, ancillary, _, _ = self._end.recvmsg(
                MESSAGE_BYTES_MAX, ancillary_bytes, socket.MSG_CMSG_CLOEXEC
            )
            handed = msgspec.json.decode(message, type=Handed)
            if not handed.kinds:
                listeners.pinned = frozenset(handed.pinned)
                listeners.held = frozenset(handed.held)
                return listeners
            for kind, fd in zip(handed.kinds, _descriptors(ancillary), strict=True):
                listener = socket.socket(fileno=fd)
                (listeners.admin if kind == ADMIN else listeners.public).append(listener)

    async def relieve(self) -> tuple[bool, socket.socket]:
        """Tell it to leave; return whether it said that it does, and our end of a link to it.

        One that knows nothing of links lets the other end go.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._end.setblocking(False)
        try:
            with theirs:
                socket.send_fds(self._end, [READY], [theirs.fileno()])
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await loop.sock_recv(self._end, MESSAGE_BYTES_MAX) == LEFT, ours
        except OSError:  # a timeout is one
            return False, ours
        finally:
            self._end.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            count = len(payload) // struct.calcsize("i")
            found += struct.unpack(f"{count}i", payload[: count * struct.calcsize("i")])
    return found


Leave = Callable[[socket.socket | None], Awaitable[None]]


async def hand_over(end: socket.socket, listeners: Listeners, leave: Leave) -> bool:
    """Serve one successor; have `leave` done once it is ready, with our end of a link to it, if it
    sent one, and only then tell it. Return whether it was ready, in time."""
    loop = asyncio.get_running_loop()
    end.setblocking(False)
    with end:
        if not _trusted(end):
            return False
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await _send(end, listeners)
                ready, link = await _receive_ready(end)
                if not ready:
                    return False
        except TimeoutError:
            _log.error("who wanted to take over was not ready within %g s", READY_TIMEOUT_S)
            return False
        except OSError:
            return False
        await leave(link)
        with contextlib.suppress(OSError):
            await loop.sock_sendall(end, LEFT)
        return True


async def _receive_ready(end: socket.socket) -> tuple[bool, socket.socket | None]:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(end, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(end)
    message, fds, _, _ = socket.recv_fds(end, MESSAGE_BYTES_MAX, 1)
    link = socket.socket(fileno=fds[0]) if fds else None
    if link is not None:
        link.set_inheritable(False)
        if message != READY:
            link.close()
            link = None
    return message == READY, link


async def _send(end: socket.socket, listeners: Listeners) -> None:
    named = [(PUBLIC, s) for s in listeners.public] + [(ADMIN, s) for s in listeners.admin]
    for start in range(0, len(named), SOCKETS_PER_MESSAGE):
        part = named[start : start + SOCKETS_PER_MESSAGE]
        kinds = msgspec.json.encode(Handed([kind for kind, _ in part]))
        socket.send_fds(end, [kinds], [listener.fileno() for _, listener in part])
    held = sorted(listeners.held)
    while len(last := msgspec.json.encode(Handed([], sorted(listeners.pinned), held))) > (
        MESSAGE_BYTES_MAX
    ):
        _log.warning("no room to hand over that %s is drained: drain it again", held.pop())
    await asyncio.get_running_loop().sock_sendall(end, last)


def _trusted(end: socket.socket) -> bool:
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return uid in (0, os.geteuid())


class Door:
    """The unix socket at which successors knock."""

    def __init__(self, path: str) -> None:
        """Listen at `path`, in place of a proxy that has left. Raises `StartError`."""
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        fresh = f"{path}.{os.getpid()}"
        before = os.umask(0o177)  # only the owner may connect
        try:
            self._listener.bind(fresh)
            self._listener.listen(1)
            os.rename(fresh, path)
        except OSError as error:
            self._listener.close()
            raise StartError(
                f"upgrade_socket: cannot listen at {path}: {error.strerror or error}"
            ) from error
        finally:
            os.umask(before)
        self._inode = os.stat(path).st_ino

    async def knock(self) -> socket.socket:
        """Wait for the next one who comes."""
        end, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return end

    def close(self) -> None:
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:  # else a successor's
                os.unlink(self._path)


def socket_in_use(path: str) -> bool:
    """Say whether a proxy waits at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.setblocking(False)
        return end.connect_ex(path) == 0


async def end_of(successor: asyncio.subprocess.Process) -> int:
    """Wait for a successor that failed; end it when it hangs. Its workers end with it."""
    for end in (successor.terminate, successor.kill):
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(successor.wait(), END_TIMEOUT_S)
        _log.error("the new proxy (pid %d) hangs; ending it", successor.pid)
        with contextlib.suppress(ProcessLookupError):
            end()
    return await successor.wait()
