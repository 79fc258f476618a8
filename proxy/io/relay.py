"""The answer's way back to the client, and what a client may do at any time meanwhile.

What an exchange with a replica and one with the offline service have in common: the head is
written afresh and goes with the first octets, octets pass no faster than the client reads them, and
a client that goes ends the work at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from proxy import errors
from proxy.core import head as heads
from proxy.core.chunked import ChunkedDecoder
from proxy.core.http1 import ResponseHead
from proxy.core.preamble import Preamble
from proxy.io.endings import Client, Ending
from proxy.io.plane import Plane


class Relay(Ending, ABC):
    """One request, as its client's connection sees it."""

    __slots__ = ("_paused", "_unsent_head")

    def __init__(self, plane: Plane, client: Client, preamble: Preamble, length: int) -> None:
        super().__init__(plane, client, preamble, length)
        self._unsent_head = b""  # of the answer, rendered
        self._paused = False

    # --- from the client's connection --------------------------------------------------------

    @abstractmethod
    def judge_head(self) -> None:
        """Everything that can be refused before the body is read. Raises `ProxyError`."""

    @abstractmethod
    def hold_body(self, size: int) -> None:
        """Count octets of the body against what may be held. Raises `ProxyError`."""

    @abstractmethod
    def begin(self, body: bytes) -> None:
        """Go on, with a body that is whole. Failures are answered, and nothing is raised."""

    @abstractmethod
    def check_deadline(self, now_s: float) -> None:
        """Called by the sweep: end what has been silent for too long."""

    def client_gone(self) -> None:
        """The client closed: the work stops, the lease is released, whatever state we are in."""
        if self._done:
            return
        self._plane.telemetry.cancellations[self._progress.name.lower()] += 1
        self._drop_replica()
        self._finish(errors.CLIENT_GONE_STATUS, errors.CLIENT_GONE)

    def client_slow(self) -> None:
        self._paused = True
        if self._upstream is not None:
            self._upstream.pause()

    def client_reads(self) -> None:
        self._paused = False
        self._last_octet_s = self._plane.clock.now_s()
        if self._upstream is not None:
            self._upstream.resume()

    # --- to the client -----------------------------------------------------------------------

    def _render_head(self, head: ResponseHead, length: int) -> None:
        framing = heads.framing_line(head, length, self._preamble.minor)
        if head.chunked and not framing:
            self._decoder = ChunkedDecoder()
        if not framing and head.status not in (204, 304):
            self._keep_alive = False  # only our close can tell the client where the body ends
        keep_alive = self._keep_alive = self._may_keep_alive()  # what it is told now holds
        extra = self._persistence(keep_alive) + self._diagnostics()
        self._unsent_head = heads.client_head(
            head, self.request_id, framing=framing, keep_alive=keep_alive, extra=extra
        )

    def response_head_due(self) -> None:
        """What came with the head has been relayed. If that was nothing, the head goes alone."""
        if self._unsent_head and not self._done:
            self._send(b"")

    def _send(self, data: bytes) -> None:
        """Write to the client; the head goes with the first octets, in one call of the system."""
        if self._unsent_head:
            data, self._unsent_head = self._unsent_head + data, b""
        self._client.write(data)
