"""What a peer's kernel has acknowledged of our octets: the proof that nobody has read a request.

An engine may close an idle connection at the moment in which the next request is on its way. The
request is lost then, and may be sent again only if the engine cannot have begun it. The kernel
knows: a peer's FIN acknowledges what had reached it before it stopped sending. If that is nothing
of our request, the engine had ended the conversation before the request came; nothing of it was
read, and what is read of it later cannot be answered (RFC 9112 §9.6: it must not be processed).

A reset proves nothing, even with nothing acknowledged: a process that reads a request and then
aborts is, with the acknowledgement delayed as usual, the same to our kernel as one that closed
without reading it; both give ECONNRESET. But a reset after a FIN gives EPIPE (Linux, tcp_reset).
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

# In Linux's struct tcp_info: `__u64 tcpi_bytes_acked`, at this offset since 4.1.
_BYTES_ACKED = struct.Struct("=Q")
_BYTES_ACKED_OFFSET = 120


class Sock(Protocol):
    """What of a socket is needed; uvloop's is none by name."""

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


class Acknowledged:
    """Counts the octets of one connection that its peer's kernel has acknowledged."""

    __slots__ = ("_at_first", "_socket")

    def __init__(self, connected: Sock) -> None:
        """Raises `OSError` where the kernel does not tell."""
        self._socket = connected
        self._at_first = self._read()  # the SYN counts as one

    def octets(self) -> int:
        return self._read() - self._at_first

    def _read(self) -> int:
        size = _BYTES_ACKED_OFFSET + _BYTES_ACKED.size
        told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
        if len(told) < size:
            raise OSError("this kernel does not count acknowledged octets")
        return int(_BYTES_ACKED.unpack_from(told, _BYTES_ACKED_OFFSET)[0])
