"""What is written in one turn of the loop, written together at its end.

In one turn a loop takes what has come on many connections, and answers some and passes on others.
Each write wakes the process that it is for, which on one machine costs more than the write, and
nothing where the process is still awake from the one before. So what is to be written is held until
nothing more has come, or `WRITES_HELD_MAX` writes have: that many requests later at the most, and
where only one has come, as soon as it has been read.

The order on a connection is that of the calls; who does something else to a transport, such as to
close it, has it write first (`write_due`).
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from typing_extensions import override

from proxy.core import limits
from proxy.io.clock import Clock

_log = logging.getLogger("doherty.outbox")


class Outlet(ABC):
    """The sending side of a connection, which keeps what is due until it is told."""

    __slots__ = ()

    @abstractmethod
    def write_due(self) -> None:
        """Write what is due now, if anything is."""


class Outbox:
    """The connections of one worker that have something to write in this turn."""

    __slots__ = ("_clock", "_due", "_on_fault", "_scheduled", "on", "written_at_s")

    def __init__(self, clock: Clock, on_fault: Callable[[], None]) -> None:
        self.on = False  # while it is not, everything is written at once
        self.written_at_s = 0.0
        self._clock = clock
        self._on_fault = on_fault
        self._due: list[Outlet] = []
        self._scheduled = False

    def hold(self, outlet: Outlet) -> None:
        """Something is due on this connection, where nothing was before."""
        if not self.on:
            self.written_at_s = self._clock.now_s()
            outlet.write_due()
            return
        self._due.append(outlet)
        if len(self._due) >= limits.WRITES_HELD_MAX:
            self.write()
        elif not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn_over)

    def write(self) -> None:
        """Write all that is due."""
        due, self._due = self._due, []
        if due:
            self.written_at_s = self._clock.now_s()
        for outlet in due:
            try:
                outlet.write_due()
            except Exception:  # noqa: BLE001 - of one connection: the others are to go on
                self._on_fault()
                _log.exception("writing what is due")

    def _turn_over(self) -> None:
        self._scheduled = False
        self.write()


class Writer(Outlet):
    """An outlet that writes octets to a transport, as they come."""

    __slots__ = ("_due", "_outbox", "_transport")

    _transport: asyncio.Transport

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._due = b""

    def write(self, data: bytes) -> None:
        """Write this, at the end of the turn at the latest; at once what is much."""
        if len(self._due) + len(data) > limits.JOINED_BYTES_MAX:
            self.write_due()
            if not self._transport.is_closing():
                self._transport.write(data)
        elif self._due:
            self._due += data
        elif data:
            self._due = data
            self._outbox.hold(self)

    @override
    def write_due(self) -> None:
        data, self._due = self._due, b""
        if data and not self._transport.is_closing():
            self._transport.write(data)
