"""Server-sent events, whatever the pieces they come in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.top import events
from backends.top.events import Events, EventTooLongError

STREAM = (
    b": hello\n\nevent: view\ndata: 1\n\nevent: other\ndata: 2\n\n"
    b"event: view\r\ndata: 3\r\ndata:4\r\n\r\nid: 7\nevent: view\n"
    b"data: 5\n\nevent: view\n\ndata: 6\n\n"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=9))
def test_the_same_events_in_whatever_pieces(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    reader = Events(b"view")
    found = [
        data for begin, end in itertools.pairwise(bounds) for data in reader.feed(STREAM[begin:end])
    ]
    assert found == [b"1", b"3\n4", b"5"]


@pytest.mark.parametrize("line", [b"x" * 80, b"data: " + b"x" * 20 + b"\n"], ids=["line", "lines"])
def test_an_event_without_end_is_given_up(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EVENT_BYTES_MAX", 100)
    reader = Events(b"view")
    for _ in range(100 // len(line)):
        assert reader.feed(line) == []
    with pytest.raises(EventTooLongError):
        reader.feed(line * 3)
