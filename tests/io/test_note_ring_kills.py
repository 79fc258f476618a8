"""Processes that read a ring while another writes it, and is killed in the midst of a note."""

from __future__ import annotations

import subprocess
import sys
import time

from proxy.core import limits
from proxy.core.note_ring import RingReader, Said
from proxy.io.shared_cells import SharedNotes, rings_at
from tests.fakes.note_writer import batch_of

LIVES = 8
LIFE_BYTES = 3 * limits.NOTES_RING_BYTES
PATIENCE_S = 20.0  # only keeps a broken test from hanging


class Follower:
    """One who reads, and checks what it is told."""

    def __init__(self, reader: RingReader) -> None:
        self.reader = reader
        self.last = (0, -1)
        self.gaps = 0

    def read(self) -> None:
        lost_total = self.reader.lost_total
        for said in self.reader.take():
            self._check(said)
        self.gaps += self.reader.lost_total != lost_total

    def _check(self, said: Said) -> None:
        number = int(said.at_s)
        assert said.batch == batch_of(said.origin, number)
        assert (said.origin, number) > self.last, "each once, in their order"
        if not self.gaps and said.origin == self.last[0]:
            assert number == self.last[1] + 1
        self.last = (said.origin, number)


def write_and_die(notes: SharedNotes, origin: int, quick: Follower) -> None:
    """Have a process write until it is killed, and one read meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.note_writer", str(notes.fd), "2", str(origin)],
        pass_fds=(notes.fd,),
    )
    begin = quick.reader.end[0]
    until_s = time.monotonic() + PATIENCE_S
    try:
        while quick.reader.end[0] - begin < LIFE_BYTES:
            assert time.monotonic() < until_s
            quick.read()
    finally:
        process.kill()
        process.wait()


def test_nothing_is_made_up_and_nobody_is_held_up_however_its_writer_dies() -> None:
    notes = SharedNotes(1)
    _, (reader,) = rings_at(notes.fd, 1, notes.ends())
    quick, slow = Follower(notes.readers[0]), Follower(reader)
    for origin in range(1, LIVES + 1):
        write_and_die(notes, origin, quick)
        slow.read()
    successor, _ = rings_at(notes.fd, 0, notes.ends())
    for follower in (quick, slow):
        follower.read()
        assert not follower.reader.has_news
    assert slow.gaps, "it was overtaken, and went on"
    for number in range(3):
        successor.write(LIVES + 1, float(number), batch_of(LIVES + 1, number))
    for follower in (quick, slow):
        follower.read()
        assert follower.last == (LIVES + 1, 2)
    notes.close()
