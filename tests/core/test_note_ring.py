"""A ring gives what was written, in order, or says how much of it is lost."""

from __future__ import annotations

import random
import struct

import pytest

from proxy.core import limits
from proxy.core.note_ring import RingReader, RingWriter, Said, rings_bytes

SIZE = limits.NOTES_RING_BYTES
MOST = limits.PEER_FRAME_BYTES_MAX


class Scene:
    """Two rings, of which the second is written."""

    def __init__(self) -> None:
        self.octets = bytearray(rings_bytes(2))
        self.memory = memoryview(self.octets)
        self.writer = RingWriter(self.memory, 1)
        self.reader = self.new_reader()

    def new_reader(self) -> RingReader:
        return RingReader(self.memory, 1, self.writer.end, ours=True)


def told(said: list[Said]) -> list[tuple[int, float, bytes]]:
    return [(one.origin, one.at_s, one.batch) for one in said]


def test_what_is_written_is_read_once_by_each_and_by_those_who_come_later_from_then_on() -> None:
    scene = Scene()
    assert not scene.reader.has_news
    assert scene.reader.take() == []
    scene.writer.write(7, 1.5, b"abc")
    late = scene.new_reader()
    scene.writer.write(8, 2.5, b"")
    assert scene.reader.has_news
    assert told(scene.reader.take()) == [(7, 1.5, b"abc"), (8, 2.5, b"")]
    assert not scene.reader.has_news
    assert scene.reader.take() == []
    assert told(late.take()) == [(8, 2.5, b"")]
    assert scene.octets[: rings_bytes(1)] == bytes(rings_bytes(1))  # another's ring


def test_who_follows_a_writer_goes_on_where_he_stopped() -> None:
    scene = Scene()
    scene.writer.write(1, 0.0, b"one")
    RingWriter(scene.memory, 1).write(2, 0.0, b"two")
    assert told(scene.reader.take()) == [(1, 0.0, b"one"), (2, 0.0, b"two")]


def test_batches_of_all_sizes_come_around_the_end_unharmed() -> None:
    scene, draw = Scene(), random.Random(3)
    for number in range(3000):
        batches = [draw.randbytes(draw.choice((0, 1, 5, 17, 333, 4000))) for _ in range(3)]
        for batch in batches:
            scene.writer.write(number, number / 2, batch)
        assert told(scene.reader.take()) == [(number, number / 2, batch) for batch in batches]
    assert scene.reader.lost_total == 0
    assert scene.writer.end[0] > 4 * SIZE


def test_one_who_was_overtaken_knows_how_many_he_has_lost_and_goes_on_behind_them() -> None:
    scene = Scene()
    for _ in range(SIZE // MOST + 2):
        scene.writer.write(1, 0.0, bytes(MOST))
    assert scene.reader.take() == []
    assert scene.reader.lost_total == SIZE // MOST + 2
    scene.writer.write(1, 0.0, b"news")
    assert told(scene.reader.take()) == [(1, 0.0, b"news")]


def test_one_who_skips_has_lost_nothing() -> None:
    scene = Scene()
    for _ in range(SIZE // MOST + 2):
        scene.writer.write(1, 0.0, bytes(MOST))
    scene.reader.skip()
    assert (scene.reader.take(), scene.reader.lost_total) == ([], 0)


@pytest.mark.parametrize("at", [0, 8, 16, 24, 32, 40])
def test_what_is_there_in_part_is_not_read_before_it_is_whole(at: int) -> None:
    scene = Scene()
    scene.writer.write(1, 2.0, b"abcdefghijklmnop")
    place = rings_bytes(1) + 16 + at
    there = bytes(scene.octets[place : place + 8])
    for broken in (bytes(8), b"\xff" * 8):
        scene.octets[place : place + 8] = broken
        assert scene.reader.take() == []
        assert scene.reader.has_news
    scene.octets[place : place + 8] = there
    assert told(scene.reader.take()) == [(1, 2.0, b"abcdefghijklmnop")]


def test_what_is_overwritten_while_it_is_read_is_lost_and_nothing_else_is_taken_for_it() -> None:
    scene = Scene()
    batch = bytes(1000)
    while scene.writer.end[0] + 2000 < SIZE:
        scene.writer.write(1, 0.0, batch)
    # A writer that is about to end a note over the first ones: its octets are there, its end is not
    end = scene.writer.end
    scene.writer.write(2, 0.0, b"x" * 4000)
    counts = rings_bytes(1)
    scene.octets[counts : counts + 16] = struct.pack("<QQ", *end)
    assert scene.reader.take() == []
    assert scene.reader.lost_total == end[1]
    scene.writer.write(3, 0.0, b"whoever follows, should that one die now")
    assert [said.origin for said in scene.reader.take()] == [3]
    assert not scene.reader.has_news
