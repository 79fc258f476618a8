"""A body in pieces: all of it, in order, for about what it counts."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.pieces import KEPT_BYTES_MIN, Pieces

_SIZES = st.sampled_from([0, 1, 2, 50, KEPT_BYTES_MIN - 1, KEPT_BYTES_MIN, KEPT_BYTES_MIN + 1])


@given(st.lists(_SIZES, max_size=8), st.integers(0, 255))
def test_what_is_taken_is_what_was_added(sizes: list[int], octet: int) -> None:
    pieces = Pieces()
    added = [bytes(((octet + i) % 256,)) * size for i, size in enumerate(sizes)]
    for piece in added:
        pieces.add(piece)
    assert pieces.size == sum(sizes)
    assert pieces.take() == b"".join(added)
    assert pieces.size == 0
    assert pieces.take() == b""


def test_small_pieces_hold_what_they_count() -> None:
    pieces = Pieces()
    for _ in range(50_000):
        pieces.add(b"ab")
    held_bytes = sum(map(sys.getsizeof, pieces._kept)) + sys.getsizeof(pieces._few)
    assert held_bytes < 1.5 * pieces.size
