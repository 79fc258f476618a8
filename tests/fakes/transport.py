"""A transport without a socket: it keeps what is written, and takes it only as fast as told.

Like the real ones it never calls back into its protocol while the protocol calls it, except for
`pause_writing`, and reports the end by `connection_lost` on a later turn of the loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import Any

from typing_extensions import override

_writes = itertools.count(1)


class FakeSocket:
    """Takes options, so that a test can see whether a close was to be a reset."""

    def __init__(self) -> None:
        self.options: list[tuple[int, int, bytes]] = []

    def setsockopt(self, level: int, name: int, value: bytes) -> None:
        self.options.append((level, name, value))


class FakeTransport(asyncio.Transport):
    """One end of a connection whose other end is the test."""

    def __init__(self, protocol: asyncio.Protocol, *, high_bytes: int = 64 * 1024) -> None:
        super().__init__()
        self._protocol_here = protocol
        self.written = bytearray()  # all octets that the protocol wrote
        self.written_at = 0  # when last, counted over all transports
        self.socket = FakeSocket()
        self.eof_written = False
        self.aborted = False
        self.closed = False  # by either close or abort
        self.lost = False
        self.reading = True
        self.taking = True  # whether the peer takes what is written
        self._waiting_bytes = 0
        self._high_bytes = high_bytes
        self._writing_paused = False
        self._lost_when_taken = False

    # --- the peer ----------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Octets arrive. They cannot while reading is paused: the kernel keeps them."""
        assert self.reading, "fed while reading was paused"
        assert not self.lost, "fed after the connection was lost"
        if not self.closed:
            self._protocol_here.data_received(data)

    def take(self, size: int | None = None) -> None:
        """The peer takes `size` of the octets that wait, or all."""
        self._waiting_bytes -= self._waiting_bytes if size is None else size
        assert self._waiting_bytes >= 0
        if self._writing_paused and self._waiting_bytes <= self._high_bytes // 4:
            self._writing_paused = False
            self._protocol_here.resume_writing()
        if self._lost_when_taken and not self._waiting_bytes:
            self._lost_when_taken = False
            asyncio.get_running_loop().call_soon(self._lose, None)

    def hang_up(self, error: Exception | None = None) -> None:
        """The peer closes (or the connection breaks): the end arrives with the next turn."""
        if error is None and not self.closed:
            assert not self._protocol_here.eof_received(), "no protocol here stays half open"
        self._end(error)

    # --- the protocol ------------------------------------------------------------------------

    @override
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            return self.socket
        if name == "peername":
            return ("192.0.2.1", 40000)
        # There is no descriptor to poll; a connection with TLS is not polled either.
        return object() if name == "sslcontext" else default

    @override
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is not None:
            self._high_bytes = high

    @override
    def get_write_buffer_size(self) -> int:
        return self._waiting_bytes

    @override
    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.lost, "written after the connection was lost"
        assert not self.eof_written, "written after the end"
        if self.closed:
            return
        self.written += data
        self.written_at = next(_writes)
        if not self.taking:
            self._waiting_bytes += len(data)
            if self._waiting_bytes > self._high_bytes and not self._writing_paused:
                self._writing_paused = True
                self._protocol_here.pause_writing()

    @override
    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    @override
    def can_write_eof(self) -> bool:
        return True

    @override
    def write_eof(self) -> None:
        self.eof_written = True

    @override
    def is_closing(self) -> bool:
        return self.closed

    @override
    def is_reading(self) -> bool:
        return self.reading and not self.closed

    @override
    def pause_reading(self) -> None:
        self.reading = False

    @override
    def resume_reading(self) -> None:
        self.reading = True

    @override
    def close(self) -> None:
        self._end(None)

    @override
    def abort(self) -> None:
        self.aborted = True
        self._waiting_bytes = 0
        if self._lost_when_taken:
            self._lost_when_taken = False
            asyncio.get_running_loop().call_soon(self._lose, None)
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._lose, error)

    def _lose(self, error: Exception | None) -> None:
        if self._waiting_bytes and not self.aborted and error is None:
            # A closed transport first hands over what waits; it is lost once the peer has it.
            self._lost_when_taken = True
            return
        self.lost = True
        self._protocol_here.connection_lost(error)
