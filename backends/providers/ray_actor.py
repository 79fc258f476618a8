"""The actor that runs one engine on a node of a Ray cluster.

It is pickled by value and imports nothing of ours: a node needs Ray and the engine. Ray's scheduler
has chosen the node and the GPUs, which it names in `CUDA_VISIBLE_DEVICES`; the ports are the
manager's, and are looked at here, where alone it can be seen whether somebody else has them.

The engine's output is kept here, up to `KEPT_BYTES_MAX`, until a manager has taken it: each
question acknowledges what the one before was answered with, so that a manager after a killed one
goes on where that had come to. The engine itself ends with this actor (`ray_guard`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

KEPT_BYTES_MAX = 1024 * 1024
PIECE_BYTES_MAX = 128 * 1024
GATHER_S = 0.05  # lines come in bursts, and each answer passes several processes
LAST_LINES_S_MAX = 1.0  # a descendant that escaped may hold the pipe open for ever
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Of Ray's own workers: what the engine would take for its own orders, or give away.
_RAYS_OWN = ("RAY_", "OMP_NUM_THREADS", "PYTHONBREAKPOINT")


class EngineActor:
    """One engine process; the actor's constructor starts it, once."""

    def __init__(
        self,
        guard: str,
        mark: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        ports: Sequence[int],
        where: Callable[[], tuple[str, str]],
    ) -> None:
        """`where` returns the address of this node, and its name."""
        self._host, self._node = where()
        self._changed = threading.Condition()
        self._kept = bytearray()
        self._held: IO[bytes] | None = None  # the guard's input: at its end the engine ends
        self._first = 0  # the number of the first octet that is kept
        self._taken = 0  # octets that the manager has
        self._pid = 0
        self._ended: dict[str, Any] | None = None
        self._group = 0  # of the guard and the engine; its number is nobody else's while one lives
        taken = [port for port in ports if not _free(port)]
        if taken:
            self._ended = {"problem": f"port {taken[0]} of its node {self._host} is taken"}
        else:
            self._start(guard, mark, argv, environment(os.environ, env, mark))

    def poll(self, taken: int, wait_s: float) -> dict[str, Any]:
        """Return what is new, when something is; `taken`: octets that the manager has, if >= 0."""
        end_s = time.monotonic() + wait_s
        with self._changed:
            if taken >= 0:
                self._taken = taken
            while self._ended is None and self._first + len(self._kept) <= self._taken:
                if not self._changed.wait(max(0.0, end_s - time.monotonic())):
                    break
            if self._ended is None and wait_s:
                self._changed.wait(GATHER_S)
            start = max(self._taken, self._first)
            piece = bytes(self._kept[start - self._first :][:PIECE_BYTES_MAX])
            upto = start + len(piece)
            all_told = upto == self._first + len(self._kept)
            return {
                "host": self._host,
                "node": self._node,
                "pid": self._pid,
                "lost": start - self._taken,
                "text": piece.decode("latin-1"),
                "upto": upto,
                "ended": self._ended if all_told else None,
            }

    def signal(self, number: int) -> None:
        """Signal the engine and all that it started."""
        with self._changed:
            if self._group and self._ended is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._group, number)

    def _start(self, guard: str, mark: str, argv: Sequence[str], env: dict[str, str]) -> None:
        told, tells = os.pipe()
        output, writes = os.pipe()
        try:
            starter = subprocess.Popen(  # noqa: S603  # our own text
                [sys.executable, "-S", "-c", guard, str(tells)],
                stdin=subprocess.PIPE,
                stdout=writes,
                stderr=writes,
                pass_fds=(tells,),
                start_new_session=True,
            )
        finally:
            os.close(tells)
            os.close(writes)
        order = {"argv": [_program(argv[0], env), *argv[1:]], "env": env, "mark": mark}
        reader = self._thread(self._read, output)
        self._group = starter.pid
        starter.wait()  # it has left the guard, and the group
        self._held = starter.stdin
        assert self._held is not None
        with suppress(OSError):  # it is gone already, and `_follow` says so
            self._held.write(json.dumps(order).encode() + b"\n")
            self._held.flush()
        self._thread(self._follow, told, reader)

    def _thread(self, call: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=call, args=args, daemon=True)
        thread.start()
        return thread

    def _read(self, output: int) -> None:
        while block := os.read(output, 65536):
            with self._changed:
                self._kept += block
                beyond = len(self._kept) - KEPT_BYTES_MAX
                if beyond > 0:
                    del self._kept[:beyond]
                    self._first += beyond
                self._changed.notify_all()
        os.close(output)

    def _follow(self, told: int, reader: threading.Thread) -> None:
        """Take what the guard tells, until it is gone."""
        said: dict[str, Any] = {}
        with open(told, "rb") as lines:
            for line in lines:
                said |= json.loads(line)
                self._pid = said.get("pid", 0)
        with suppress(ProcessLookupError):  # one that was killed alone has left an engine
            os.killpg(self._group, signal.SIGKILL)
        reader.join(LAST_LINES_S_MAX)
        if self._held is not None:
            with suppress(OSError):
                self._held.close()
        with self._changed:
            if "status" not in said and "problem" not in said:
                said["status"] = signal.SIGKILL  # nothing less ends a guard without a word
            self._ended = {key: said[key] for key in ("status", "problem") if key in said}
            self._changed.notify_all()


def environment(own: Mapping[str, str], given: Mapping[str, str], mark: str) -> dict[str, str]:
    """Return the engine's environment: the node's, what it is given, and the cards that Ray gave.

    Not what Ray says to its own workers: with a token the engine could command the cluster.
    """
    env = {key: value for key, value in own.items() if not key.startswith(_RAYS_OWN)}
    env |= given
    if _VISIBLE in own and _VISIBLE not in given:
        env[_VISIBLE] = own[_VISIBLE]
    name, _, value = mark.partition("=")
    return {**env, name: value}


def _program(name: str, env: Mapping[str, str]) -> str:
    """Return the program of this name: beside this interpreter, else by the engine's own PATH."""
    beside = os.path.dirname(sys.executable)
    path = env.get("PATH", os.defpath)
    return name if "/" in name else shutil.which(name, path=beside + os.pathsep + path) or name


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True
