"""An answer in which the tier is told that it was served by: what that changes on its way.

Its octets are other ones than the engine's, and so is the length of a whole answer, whose head
waits until it is known. Where no tier was named nothing here is done.
"""

from __future__ import annotations

from abc import ABC

from typing_extensions import override

from proxy.core import limits
from proxy.core.chunked import decode_followed
from proxy.core.http1 import ResponseHead
from proxy.core.preamble import Preamble
from proxy.core.tier_echo import Echo, echo_for
from proxy.io.endings import Client
from proxy.io.plane import Plane
from proxy.io.relay import Relay


class Echoing(Relay, ABC):
    """One request whose answer may have to name a tier."""

    __slots__ = ("_echo", "_tier")

    def __init__(self, plane: Plane, client: Client, preamble: Preamble, length: int) -> None:
        super().__init__(plane, client, preamble, length)
        self._tier = b""  # to be told; empty: none was named
        self._echo: Echo | None = None

    def _begin_echo(self, head: ResponseHead, length: int) -> None:
        if self._tier:
            self._echo = echo_for(head, length, self._tier)

    def _end_echo(self) -> None:
        """The engine's answer has ended: what is held of it goes out."""
        echo, self._echo = self._echo, None
        if echo is None:
            return
        held = echo.holds
        data = echo.end()
        if held and self._response is not None:
            self._render_head(self._response, len(data))
        if data:
            self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """Relay octets to the client, and keep the last of them."""
        keep = limits.USAGE_TAIL_BYTES
        self._tail = data[-keep:] if len(data) >= keep else (self._tail + data)[-keep:]
        if self._decoder is not None:
            data = decode_followed(self._decoder, data)
        self._send(data)

    @override
    def response_head_due(self) -> None:
        if self._echo is None or not self._echo.holds:
            super().response_head_due()

    @property
    def _open_chunk(self) -> tuple[int, int] | None:
        """What the client's reader still expects of the open chunk (see `Upstream.open_chunk`)."""
        if self._echo is not None:
            return 0, 0  # our own chunks are whole
        return self._upstream.open_chunk if self._upstream is not None else None
