"""What the listening sockets hand on to the connections that they accept."""

from __future__ import annotations

import socket

from proxy.core import limits
from proxy.listeners import open_listeners


def test_the_kernel_keeps_little_unsent_for_an_accepted_connection() -> None:
    (listener,) = open_listeners("127.0.0.1", 0, 1)
    with listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                kept = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    assert kept == limits.UNSENT_BYTES_MAX
