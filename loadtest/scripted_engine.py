"""An engine that answers as each request's own script says, and breaks as it is told.

`python -m loadtest.scripted_engine --port N`. A request names its script in the field `x-script`
(see `loadtest.scripts`): how many events, how far apart, under which framing, where and how to
fail. It stands in the head, so that even a connection that ends before the body has come can be
scripted. Every event carries the request's token and a number: its reader can prove what became of
it.

With `--journal FILE` each request is written down when its head is read, when it is answered and
when it is cut, with the time: one unbuffered line each, so that a SIGKILL loses none. The clock is
CLOCK_MONOTONIC, which all processes of a machine share. `--brief` leaves out what is in order. With
`--orders` it also reads `Order`s, a JSON line each, from standard input, and ends when that does:
no orphan outlives who started it.

Lean on purpose, because it shares the machine with what is measured: one `asyncio.Protocol` on
uvloop, no task a request.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import socket
import sys
import time
import zlib
from typing import TYPE_CHECKING, cast

import msgspec
import uvloop

from loadtest.scripts import MODEL, RESET, How, Order, Script, answer_head, pieces

if TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method):  # typing.override is Python 3.12's
        return method


HEAD_BYTES_MAX = 64 * 1024
BACKLOG = 4096
# From the last octets before a break to the break itself, so that it does not overtake them.
BREAK_DELAY_S = 0.002
# How far ahead an ordered break may lie: it should come soon after its order.
BREAK_PIECES_AHEAD = 3
IN_ORDER = ("head", "done", "left")  # words of the journal

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,12})\r\n", re.IGNORECASE)
_SCRIPT = re.compile(rb"\r\nx-script: *([^\r]+)\r\n", re.IGNORECASE)


class Engine:
    """What all connections of this process share."""

    def __init__(self, journal: str, *, brief: bool) -> None:
        self.connections: set[Connection] = set()
        self.answering: set[Connection] = set()
        self.to_refuse = 0
        self.refuse_how: How = "close"
        self._brief = brief
        self._journal = -1
        if journal:
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, what: str, token: str, detail: str = "") -> None:
        if self._journal >= 0 and not (self._brief and what in IN_ORDER):
            os.write(self._journal, f"{what} {token} {time.monotonic():.6f} {detail}\n".encode())

    def obey(self, order: Order) -> None:
        if order.do == "refuse":
            self.to_refuse, self.refuse_how = order.count, order.how
        elif order.do == "hang_up":
            for connection in self.connections - self.answering:
                connection.transport.abort()
        else:
            draw = random.Random(order.seed)
            for connection in sorted(self.answering, key=lambda one: one.token):
                if draw.random() < order.share:
                    if order.do == "pause":
                        connection.hold(order.seconds)
                    else:
                        connection.break_soon(order.how, draw)
        self.note("obeyed", "-", order.do)


class Connection(asyncio.Protocol):
    """One connection; one request at a time, as a proxy sends them."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._script: Script | None = None
        self._body_bytes = 0
        self._taken_bytes = 0
        self._crc = 0
        self._pieces: list[bytes] = []
        self._sent_bytes = 0
        self._break_at_bytes = -1
        self._break_how: How = "close"
        self._broken = False
        self._head = b""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def token(self) -> str:
        return self._script.token if self._script else "-"

    # --- from the transport ------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._engine.connections.add(self)
        if self._engine.to_refuse:
            self._engine.to_refuse -= 1
            self._break(self._engine.refuse_how)

    @override
    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        if self._script is not None:
            self._take_body(data)
            return
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end >= 0:
            head, rest = self._buffer[: end + 2], self._buffer[end + 4 :]
            self._buffer = b""
            self._take_head(head, rest)
        elif len(self._buffer) > HEAD_BYTES_MAX:
            self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self in self._engine.answering:
            self._engine.answering.discard(self)
            self._engine.note("left", self.token)

    # --- the request -------------------------------------------------------------------------

    def _take_head(self, head: bytes, rest: bytes) -> None:
        if head.startswith(b"GET "):
            models = b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL.encode()
            self._reply(200, models)
            return
        length, script = _LENGTH.search(head), _SCRIPT.search(head)
        if length is None or script is None:
            self._reply(400, b'{"error":{"message":"a length and an x-script are needed"}}')
            self.transport.close()
            return
        self._script = msgspec.json.decode(script[1], type=Script)
        self._body_bytes, self._taken_bytes, self._crc = int(length[1]), 0, 0
        self._engine.note("head", self.token)
        if self._script.point == "head":
            self._break(self._script.how)
        else:
            self._take_body(rest)

    def _reply(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d -\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)

    def _take_body(self, data: bytes) -> None:
        script = self._script
        assert script is not None
        if self._taken_bytes == self._body_bytes and data:
            self._engine.note("surplus", self.token)
            self.transport.abort()
            return
        self._taken_bytes += len(data)
        self._crc = zlib.crc32(data, self._crc)
        if script.point == "half_body" and self._taken_bytes * 2 >= self._body_bytes:
            self._break(script.how)
        elif self._taken_bytes >= self._body_bytes:
            if script.crc and script.crc != self._crc:
                self._engine.note("spoiled", self.token)
            if script.point == "body":
                self._break(script.how)
            else:
                self._begin_answer(script)

    # --- the answer --------------------------------------------------------------------------

    def _begin_answer(self, script: Script) -> None:
        self._pieces = pieces(script)
        self._pieces.reverse()  # the next is the last
        total_bytes = sum(map(len, self._pieces))
        self._head = answer_head(script, total_bytes)
        self._sent_bytes = 0
        self._break_at_bytes = -1
        if script.point == "mid_body":
            self._break_at_bytes, self._break_how = total_bytes // 2, script.how
        self._engine.answering.add(self)
        if script.first_ms:
            self._timer = self._loop.call_later(script.first_ms / 1000, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Write the next piece, or all of them."""
        script = self._script
        assert script is not None
        self._timer = None
        if self._head and (script.point == "response_head" or script.pause_ms):
            self.transport.write(self._head)
            self._head = b""
            if script.point == "response_head":
                self._stop_answering()
                self._timer = self._loop.call_later(BREAK_DELAY_S, self._break, script.how)
                return
        if script.pause_ms:
            if self._write(self._pieces.pop()) and self._pieces:
                self._timer = self._loop.call_later(script.pause_ms / 1000, self._go_on)
                return
        else:
            head, self._head = self._head, b""
            self.transport.write(head)
            self._pieces.reverse()
            data, self._pieces = b"".join(self._pieces), []
            self._write(data)
        if self in self._engine.answering:
            self._end_answer(script)

    def _write(self, data: bytes) -> bool:
        """Write body octets, up to where the break is due. Returns whether all were written."""
        left = self._break_at_bytes - self._sent_bytes
        if self._break_at_bytes >= 0 and left <= len(data):
            self.transport.write(data[: max(0, left)])
            self._stop_answering()
            self._timer = self._loop.call_later(BREAK_DELAY_S, self._break, self._break_how)
            return False
        self.transport.write(data)
        self._sent_bytes += len(data)
        return True

    def _end_answer(self, script: Script) -> None:
        self._stop_answering()
        self._engine.note("done", self.token)
        self._script = None
        if script.framing == "close":
            self.transport.close()

    def _stop_answering(self) -> None:
        self._engine.answering.discard(self)

    # --- failing -----------------------------------------------------------------------------

    def hold(self, seconds: float) -> None:
        """Say nothing for a while."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._go_on)

    def break_soon(self, how: How, draw: random.Random) -> None:
        """Fail at some octet of what comes next; before the head, perhaps at once."""
        if self._head and draw.random() < 0.5:
            self._break(how)
            return
        ahead_bytes = sum(map(len, self._pieces[-BREAK_PIECES_AHEAD:]))
        self._break_at_bytes = self._sent_bytes + draw.randrange(ahead_bytes)
        self._break_how = how

    def _break(self, how: How) -> None:
        self._engine.note("cut", self.token, how)
        self._broken = True
        self._stop_answering()
        if self._timer is not None:
            self._timer.cancel()
        if how == "half_close":
            self.transport.write_eof()
            return
        if how == "reset":
            connected = self.transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()


class Orders(asyncio.Protocol):
    """Standard input: orders, a line each; its end is ours."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rest = b""
        self.ended = asyncio.get_running_loop().create_future()

    @override
    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._engine.obey(msgspec.json.decode(line, type=Order))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def serve(args: argparse.Namespace) -> None:
    """Serve until ordered, or signalled, to end."""
    loop = asyncio.get_running_loop()
    engine = Engine(args.journal, brief=args.brief)
    await loop.create_server(
        lambda: Connection(engine), "127.0.0.1", args.port, backlog=BACKLOG, reuse_address=True
    )
    engine.note("listening", "-", str(os.getpid()))
    if not args.orders:
        await loop.create_future()
    _, orders = await loop.connect_read_pipe(
        lambda: Orders(engine), os.fdopen(sys.stdin.fileno(), "rb", closefd=False)
    )
    await orders.ended


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.scripted_engine", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", default="", help="file to write requests down in")
    parser.add_argument("--brief", action="store_true", help="write down only what is out of order")
    parser.add_argument("--orders", action="store_true", help="read orders from standard input")
    uvloop.run(serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
