"""What systemd is told of this process (sd_notify(3)); nothing where it did not start it.

Of a proxy that takes over it is told the new main process, so that the unit is the successor's from
then on, and the old one's end is no failure. `WATCHDOG_PID` is not looked at: a successor inherits
the one of the process that it relieves, and is watched as well.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # not for children of their own


def serving(words: str) -> None:
    """Say that this process is the service now, and what it does."""
    _tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS={words}")


def stopping(words: str) -> None:
    _tell("STOPPING=1", f"STATUS={words}")


def alive() -> None:
    """Say that the event loop turns, if anybody wants to know (WatchdogSec=)."""
    if "WATCHDOG_USEC" in os.environ:
        _tell("WATCHDOG=1")


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child that must not speak for this process."""
    return {name: value for name, value in environment.items() if name not in VARIABLES}


def _tell(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # the abstract namespace, unix(7)
        address = "\0" + address[1:]
    # A full queue or a socket that is gone must not hold up or end what serves.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end,
    ):
        end.sendto("\n".join(lines).encode(), address)
