"""Notes in memory that the processes of one proxy share: a ring for each, which it alone writes.

To write wakes nobody: whoever chooses a replica reads first, and then knows all that the others had
decided until then, at the price of a look at one number of each ring where there is nothing new. To
send them would cost each request three times three processes that are woken.

A reader keeps its own place and is waited for by nobody. One that was overtaken knows how many
notes it has lost, and has all that is open told again. Each note has a check sum over its place and
its octets: one that is being overwritten, or that a processor of weak order shows too early, is not
taken for what it is not.

That rests on two things. The place counts from the first octet ever written, so what is there from
an earlier time around has the sum of another place. And the counts before a ring are aligned words
of eight octets, which processors of 64 bits write and read as a whole, ARM's, too.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest

from proxy.core import limits

_SIZE: Final = limits.NOTES_RING_BYTES
_COUNTS_BYTES: Final = 16  # octets ever written, with their heads and gaps; and notes
_CHECK: Final = Struct("<Q")
_HEAD: Final = Struct("<QdQ")  # origin, moment, octets; the check sum is before it
_HEAD_BYTES: Final = _CHECK.size + _HEAD.size
_UNIT: Final = 8  # each note begins at a multiple
_NOTE_BYTES_MAX: Final = _HEAD_BYTES + limits.PEER_FRAME_BYTES_MAX


def rings_bytes(rings: int) -> int:
    """Return the size of the memory of so many rings."""
    return rings * (_COUNTS_BYTES + _SIZE)


class Said:
    """What one origin has said at one moment: a note, or several as one batch."""

    __slots__ = ("at_s", "batch", "origin", "ours")

    def __init__(self, origin: int, at_s: float, batch: bytes, *, ours: bool = False) -> None:
        self.origin = origin
        self.at_s = at_s
        self.batch = batch
        self.ours = ours  # by a worker of this proxy


class _Ring:
    """One ring in the memory of all."""

    def __init__(self, memory: memoryview, number: int) -> None:
        start = rings_bytes(number)
        self._counts = memory[start : start + _COUNTS_BYTES].cast("Q")
        self._octets = memory[start + _COUNTS_BYTES : rings_bytes(number + 1)]

    @property
    def end(self) -> tuple[int, int]:
        """Where the next note will be: octets and notes before it."""
        return self._counts[0], self._counts[1]

    def release(self) -> None:
        """Let go of the memory."""
        self._counts.release()
        self._octets.release()


class RingWriter(_Ring):
    """The end of the only one who writes it. Whoever follows him goes on where he stopped."""

    def write(self, origin: int, at_s: float, batch: bytes) -> None:
        """Say this; of a batch, the moment of its first note."""
        assert len(batch) <= limits.PEER_FRAME_BYTES_MAX
        begin = self._counts[0]
        octets = _HEAD.pack(origin, at_s, len(batch)) + batch
        octets = _CHECK.pack(xxh3_64_intdigest(octets, begin)) + octets
        at = begin % _SIZE
        left = _SIZE - at
        if len(octets) <= left:
            self._octets[at : at + len(octets)] = octets
        else:
            self._octets[at:] = octets[:left]
            self._octets[: len(octets) - left] = octets[left:]
        self._counts[1] += 1
        self._counts[0] = begin + _whole(len(octets))


class RingReader(_Ring):
    """One reader's place in another's ring."""

    def __init__(
        self, memory: memoryview, number: int, begin: tuple[int, int], *, ours: bool
    ) -> None:
        """`begin` was the end of it; `ours`: it is the ring of a worker of this proxy."""
        super().__init__(memory, number)
        self.lost_total = 0
        self._ours = ours
        self._at, self._seen = begin

    @property
    def has_news(self) -> bool:
        return self._counts[0] != self._at

    def skip(self) -> None:
        """Go on behind all that has been said."""
        self._at, self._seen = self.end

    def take(self) -> list[Said]:
        """Return what has been said since, as far as it can be read."""
        found: list[Said] = []
        end = self._counts[0]
        while self._at < end:
            if self._counts[0] - self._at > _SIZE:
                self._lose()
                break
            said = self._read()
            if said is None:
                # Where one more note would overwrite it, one is about to, or was when its writer
                # died. Else it is there in a moment.
                if self._counts[0] - self._at > _SIZE - _NOTE_BYTES_MAX:
                    self._lose()
                break
            found.append(said)
            self._at += _whole(_HEAD_BYTES + len(said.batch))
            self._seen += 1
        return found

    def _lose(self) -> None:
        """It was overtaken."""
        self.lost_total += self._counts[1] - self._seen
        self.skip()

    def _read(self) -> Said | None:
        head = self._get(self._at, _HEAD_BYTES)
        (check,) = _CHECK.unpack_from(head)
        origin, at_s, size = _HEAD.unpack_from(head, _CHECK.size)
        if size > limits.PEER_FRAME_BYTES_MAX:
            return None
        batch = self._get(self._at + _HEAD_BYTES, size)
        if xxh3_64_intdigest(head[_CHECK.size :] + batch, self._at) != check:
            return None
        return Said(origin, at_s, batch, ours=self._ours)

    def _get(self, begin: int, size: int) -> bytes:
        at = begin % _SIZE
        octets = bytes(self._octets[at : at + size])
        if len(octets) < size:
            octets += bytes(self._octets[: size - len(octets)])
        return octets


def _whole(size: int) -> int:
    """Return the octets that so many take, up to where the next note begins."""
    return (size + _UNIT - 1) // _UNIT * _UNIT
