"""The connection under the requests of a client: when it is read, and how it is closed.

Reading stops while more would have to be held than may be; as the loop does not tell then that the
client has gone, it is asked. After an answer that comes before its request has been read, reading
goes on for a moment and what comes is dropped, so that the client sees the answer and not a reset
(RFC 9112 §9.6); this is bounded in time, and in octets.
"""

from __future__ import annotations

import asyncio
import enum
import select
from abc import ABC, abstractmethod
from typing import Final

from proxy.core import limits
from proxy.io.outbox import Writer
from proxy.io.paths import mind_path
from proxy.io.plane import Plane


class State(enum.Enum):
    IDLE = enum.auto()  # nothing of a request has come
    HEAD = enum.auto()
    BODY = enum.auto()
    PASSING = enum.auto()  # the exchange gets the body as it comes
    SERVING = enum.auto()  # the exchange has the request
    LINGERING = enum.auto()  # answered; reading on before the close
    CLOSED = enum.auto()


# Looked up once: every piece of data asks.
IDLE: Final = State.IDLE
HEAD: Final = State.HEAD
BODY: Final = State.BODY
PASSING: Final = State.PASSING
SERVING: Final = State.SERVING
LINGERING: Final = State.LINGERING
CLOSED: Final = State.CLOSED


class Connection(Writer, ABC):
    """One client connection, below what is said on it."""

    __slots__ = (
        "_deadline_s", "_lingered_bytes", "_looking", "_plane", "_reading_paused", "_state",
    )  # fmt: skip

    def __init__(self, plane: Plane) -> None:
        super().__init__(plane.outbox)
        self._plane = plane
        self._state = IDLE
        self._deadline_s = 0.0
        self._reading_paused = False
        self._looking = False
        self._lingered_bytes = 0

    @abstractmethod
    def eof_received(self) -> bool:
        """The client has closed, or its side."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what has been read of requests that will not be served."""

    # --- reading -----------------------------------------------------------------------------

    def hold_back(self) -> None:
        """Read nothing more for now."""
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
            if not self._looking:
                self._look_later()

    def read_on(self) -> None:
        """Read on, where a body that passes was held back."""
        if self._reading_paused and self._state is PASSING:
            self._reading_paused = False
            self._transport.resume_reading()

    def _look_later(self) -> None:
        self._looking = True
        asyncio.get_running_loop().call_later(limits.PAUSED_LOOK_S, self._look)

    def _look(self) -> None:
        """See whether a client whose octets we do not read now has gone: nothing else tells us."""
        self._looking = False
        if not self._reading_paused or self._transport.is_closing():
            return
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        if poll.poll(0):
            self.eof_received()
            self._transport.close()
        else:
            self._look_later()

    def mind_path(self) -> None:
        """The other end is a proxy of another region."""
        mind_path(self._transport)

    # --- closing -----------------------------------------------------------------------------

    def _close_gently(self, *, unread: bool) -> None:
        self._forget()
        if unread and not self._transport.is_closing() and self._transport.can_write_eof():
            self._state = LINGERING
            self._deadline_s = self._plane.clock.now_s() + limits.LINGER_S
            self.write_due()
            self._transport.write_eof()
            if self._reading_paused:
                self._reading_paused = False
                self._transport.resume_reading()
        else:
            self._close()

    def _close(self) -> None:
        """Close once what waits is taken. A goodbye of TLS is not waited for beyond the linger."""
        self._state = CLOSED
        self._deadline_s = self._plane.clock.now_s() + limits.LINGER_S
        self.write_due()
        self._transport.close()

    def _linger(self, size: int) -> None:
        self._lingered_bytes += size
        if self._lingered_bytes > limits.LINGER_BYTES_MAX:
            # No more, but no reset yet either: it could overtake the answer.
            self._transport.pause_reading()
        elif size < limits.LINGER_GULP_BYTES:
            # Taken piece by piece, a flood of tiny ones would cost more than what it was refused.
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(limits.LINGER_PAUSE_S, self._linger_on)

    def _linger_on(self) -> None:
        if self._state is LINGERING:
            self._transport.resume_reading()
