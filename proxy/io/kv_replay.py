"""What an engine has said before, told again: as much of it as still matters.

An engine keeps its last ten thousand batches or so, and whoever comes new asks for all of them.
What it said before its cache was last emptied says nothing of what is in it now; but that it was
emptied is told further on. So what comes is held unread, as long as there is room for it, and
dropped when a later batch tells of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

import zmq

from proxy.core import limits
from proxy.core.kv_wire import tells_of_clearing
from proxy.io import kv_sockets
from proxy.io.kv_reach import LostError
from proxy.io.kv_sockets import Socket

# Engines answer a replay between two batches, when idle within 0.1 s.
ANSWER_S = 5.0

AT_ONCE = 64  # messages that are held; between two of these, others have their turn

_END: Final = b"\xff" * 8
_FRAMES_BYTES: Final = 512  # of a message beside its payload


class Room:
    """How much may be held of all replays together."""

    def __init__(self) -> None:
        self.left_bytes = limits.KV_HELD_BYTES_MAX


class Held:
    """The messages of one replay that are not read yet."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._messages: list[list[bytes]] = []
        self._bytes = 0
        self._full = False  # it was: from then on all is read as it comes

    def due(self, frames: list[bytes]) -> list[list[bytes]]:
        """Take a message; return those that are to be read now."""
        if self._full:
            return [frames]
        if tells_of_clearing(frames[-1]):
            self.take()
        size = len(frames[-1]) + _FRAMES_BYTES
        self._messages.append(frames)
        self._bytes += size
        self._room.left_bytes -= size
        self._full = self._room.left_bytes < 0
        return self.take() if self._full else []

    def take(self) -> list[list[bytes]]:
        """Return all that is held, and hold it no more."""
        messages, self._messages = self._messages, []
        self._room.left_bytes += self._bytes
        self._bytes = 0
        return messages


async def replayed(
    context: zmq.Context[Socket], endpoint: str, first: int, room: Room | None
) -> AsyncGenerator[list[bytes]]:
    """Give the messages from number `first` on, with `room` those that still matter.

    Raises `LostError`.
    """
    dealer = kv_sockets.opened(context, zmq.DEALER)
    held = Held(room) if room is not None else None
    count = 0
    try:
        dealer.connect(endpoint)
        dealer.send_multipart((b"", first.to_bytes(8, "big")))
        while (frames := await _next(dealer, endpoint))[-2:] != [_END, b""]:
            for message in (frames,) if held is None else held.due(frames):
                yield message
            count += 1
            if count % AT_ONCE == 0:
                await asyncio.sleep(0)
        for message in () if held is None else held.take():
            yield message
    finally:
        if held is not None:
            held.take()
        dealer.close(linger=0)


async def _next(dealer: Socket, endpoint: str) -> list[bytes]:
    while (frames := kv_sockets.take(dealer)) is None:
        if not await kv_sockets.arrival(ANSWER_S, dealer):
            raise LostError(f"no replay is answered at {endpoint}")
    return frames
