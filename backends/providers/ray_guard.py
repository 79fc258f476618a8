"""Stands between a Ray actor and the engine that it runs, so that neither outlives the other.

Run on the node by the text of this file, so it imports nothing of ours. It is in the session of the
engine, and no child of the actor: of these Ray kills each when it ends an actor, and the guard must
be the last to go. Its standard input is held open by the actor: at its end the actor is gone,
whatever killed it, and everything here is killed. When the engine ends, its status is told on the
descriptor that the first argument names, and what it left is killed, too: a core that outlived its
server would keep the GPU's memory. What had gone to a session of its own is known by the mark in
its environment.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress

_ORDERLY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # meant for the engine
_RESET = (*_ORDERLY, signal.SIGPIPE)


def main() -> None:
    if os.fork():
        return
    told_fd = int(sys.argv[1])
    os.set_inheritable(told_fd, False)
    for number in _ORDERLY:
        signal.signal(number, lambda *_: None)
    order = json.loads(_first_line(0))
    mark = order["mark"]
    try:
        pid = os.posix_spawnp(
            order["argv"][0],
            order["argv"],
            order["env"],
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsigmask=(),
            setsigdef=_RESET,
        )
    except (OSError, ValueError) as error:
        _tell(told_fd, problem=str(error))
        return
    _tell(told_fd, pid=pid)
    status = _until_either_ends(pid)
    if status is not None:
        _tell(told_fd, status=status)
    _sweep(mark.encode())
    os.killpg(0, signal.SIGKILL)


def _first_line(fd: int) -> bytes:
    """Return the order, after which nothing follows but the end."""
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(fd, 65536)
        if not block:
            sys.exit(1)
        line += block
    return line


def _until_either_ends(pid: int) -> int | None:
    """Return the engine's wait status; None: the actor is gone."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if pidfd in ready:
            return os.waitpid(pid, 0)[1]
        if 0 in ready and not os.read(0, 65536):
            return None


def _sweep(mark: bytes) -> None:
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if mark in file.read().split(b"\0"):
                os.kill(int(name), signal.SIGKILL)


def _tell(fd: int, **said: object) -> None:
    with suppress(OSError):  # the actor is gone: the end of our input says so next
        os.write(fd, json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main()
