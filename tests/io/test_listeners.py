"""What the listening sockets hand on to the connections that they accept."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from proxy.core import limits
from proxy.listeners import StartError, given_by_systemd, open_listeners


def test_the_kernel_keeps_little_unsent_for_an_accepted_connection() -> None:
    (listener,) = open_listeners("127.0.0.1", 0, 1)
    with listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                kept = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    assert kept == limits.UNSENT_BYTES_MAX


@pytest.mark.parametrize("count", ["x", "-1", "1.5", "²"])
def test_a_count_of_sockets_that_is_none_is_told(count: str) -> None:
    told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
    with pytest.raises(StartError, match=r"LISTEN_FDS=.* is no number"):
        given_by_systemd(told)


def test_what_is_given_and_does_not_listen_is_told() -> None:
    """As systemd would give them, in a process of its own: descriptor 3 is what the test says."""
    program = (
        "import os, socket, sys; from proxy.listeners import StartError, given_by_systemd\n"
        "kind = getattr(socket, sys.argv[1], None)\n"
        "given = socket.socket(type=kind).detach() if kind else os.open('/dev/null', 0)\n"
        "os.dup2(given, 3)\n"
        "try: given_by_systemd({'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'})\n"
        "except StartError as error: sys.exit(str(error))\n"
    )
    for kind in ("SOCK_DGRAM", "SOCK_STREAM", "none"):
        ended = subprocess.run(
            [sys.executable, "-c", program, kind], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 1
        assert ended.stderr.startswith("LISTEN_FDS: descriptor 3 is no listening stream socket")
        assert ended.stderr.count("\n") == 1
