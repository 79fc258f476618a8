"""A body that comes in pieces, joined once, and held in memory for what it counts."""

from __future__ import annotations

from typing import Final

# A piece that is kept as it came costs some 33 octets beside its own; below this it is copied to
# its neighbours, or a body in pieces of two octets would hold thirty times what it counts.
KEPT_BYTES_MIN: Final = 4096


class Pieces:
    """The octets of one body so far."""

    __slots__ = ("_few", "_kept", "size")

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        self._few = bytearray()  # of small pieces, after those that are kept
        self.size = 0

    def add(self, piece: bytes) -> None:
        size = len(piece)
        self.size += size
        if size < KEPT_BYTES_MIN:
            self._few += piece
            return
        if self._few:
            self._kept.append(bytes(self._few))
            self._few = bytearray()
        self._kept.append(piece)

    def take(self) -> bytes:
        """Return all of it, and begin anew."""
        if self._few:
            self._kept.append(bytes(self._few))
            self._few = bytearray()
        body = self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)
        self._kept.clear()
        self.size = 0
        return body
