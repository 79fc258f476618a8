"""A head without end is refused at its limit, keeps no more than the limit, and costs its length.

Counted in octets, not in seconds: how many are taken before the refusal, how many are kept, and
how many are looked at for each that comes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typing_extensions import override

from proxy.core import limits
from tests.conformance.reader import cut_at
from tests.conformance.vector import HOST, LINE
from tests.fakes.plane import Bench, Client

MakeBench = Callable[..., Bench]
_PIECE_BYTES = 64


class Watched(bytearray):
    """A buffer that counts the octets that are searched in it."""

    searched_bytes = 0

    @override
    def find(self, *args: object) -> int:
        found = super().find(*args)  # type: ignore[arg-type]  # as it came
        start = args[1] if len(args) > 1 else 0
        assert isinstance(start, int)
        self.searched_bytes += (found if found >= 0 else len(self)) - min(start, len(self))
        return found


def _kept_bytes(client: Client) -> int:
    """Return the octets that the connection holds, wherever it holds them."""
    kept = 0
    for name in type(client.protocol).__slots__:
        value = getattr(client.protocol, name, None)
        parts = value if isinstance(value, list) else [value]
        kept += sum(len(part) for part in parts if isinstance(part, bytes | bytearray))
    return kept


_FLOODS = {
    "value": (LINE + HOST + b"X: " + b"y" * limits.MIB, limits.HEAD_BYTES_MAX, 431),
    "name": (LINE + HOST + b"X" * limits.MIB, limits.HEAD_BYTES_MAX, 431),
    "fields": (LINE + HOST + b"X: y\r\n" * 180_000, limits.HEAD_BYTES_MAX, 431),
    "target": (b"GET /" + b"x" * limits.MIB, limits.TARGET_BYTES_MAX, 414),
}


@pytest.mark.parametrize("name", sorted(_FLOODS))
async def test_a_head_flood(make_bench: MakeBench, name: str) -> None:
    octets, limit_bytes, status = _FLOODS[name]
    client = make_bench().client()
    watched = client.protocol._head_buffer = Watched()
    taken_bytes = kept_bytes = 0
    for piece in cut_at(octets, range(0, len(octets), _PIECE_BYTES)):
        if not client.transport.reading:  # refused; what else comes is taken in gulps
            break
        client.send(piece)
        if not client.received:
            taken_bytes += len(piece)
            kept_bytes = max(kept_bytes, _kept_bytes(client))
    assert client.answer().status == status
    assert limit_bytes <= taken_bytes <= limit_bytes + 2 * _PIECE_BYTES
    assert limit_bytes <= kept_bytes <= limit_bytes + 2 * _PIECE_BYTES
    # Each octet is looked at a few times, however many came before it. The request line, whose end
    # is not known yet, is short.
    again_bytes = limits.TARGET_BYTES_MAX**2 // _PIECE_BYTES if name == "target" else 0
    assert taken_bytes <= watched.searched_bytes <= 8 * taken_bytes + 2 * again_bytes
    # Refused, it reads on so that the answer is seen, and keeps nothing of what comes.
    assert client.transport.eof_written
    assert not client.transport.closed
    assert _kept_bytes(client) == 0


async def test_after_the_refusal_a_flood_is_not_read_for_ever(make_bench: MakeBench) -> None:
    client = make_bench().client()
    client.send(b"\x00\r\n\r\n")
    assert client.answer().status == 400
    for _ in range(limits.LINGER_BYTES_MAX // limits.MIB):
        client.send(b"x" * limits.MIB)
    assert client.transport.reading
    client.send(b"x")
    assert not client.transport.reading
    assert not client.transport.aborted  # a reset could overtake the answer
