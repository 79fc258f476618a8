"""Connections between regions: a path that is cut must be found out within seconds.

TCP alone waits for a quarter of an hour for what it has sent to be acknowledged (RFC 1122 §4.2.3.5)
and for ever where nothing is to be sent. Probes find out the second, and a bound the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

from proxy.core import claim_limits

_IDLE_S: Final = 2
_INTERVAL_S: Final = 1
_PROBES: Final = 3


def mind_path(transport: asyncio.BaseTransport) -> None:
    """End this connection within seconds after its path."""
    connected = transport.get_extra_info("socket")
    user_timeout_ms = int(claim_limits.HOP_SILENCE_S * 1e3)
    with contextlib.suppress(OSError):  # it has ended meanwhile
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
