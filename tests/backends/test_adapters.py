"""Whether calls or a start give a process the adapters that are wanted."""

from __future__ import annotations

import pytest

from backends.adapters import Loaded, Way, after, way

ROOM = Loaded(room=True)
A, B, OTHER_A = {"a": "/a"}, {"b": "/b"}, {"a": "/other"}


@pytest.mark.parametrize(
    ("names_once", "wanted", "expected"),
    [
        (False, A, Way.NONE),
        (False, B, Way.CALLS),
        (False, A | B, Way.CALLS),
        (False, {}, Way.CALLS),
        (False, OTHER_A, Way.CALLS),
        (True, A, Way.NONE),
        (True, A | B, Way.CALLS),
        (True, {}, Way.CALLS),
        (True, OTHER_A, Way.START),
        (True, OTHER_A | B, Way.START),
    ],
)
def test_from_one_adapter(names_once: bool, wanted: dict[str, str], expected: Way) -> None:
    assert way(after(ROOM, A, names_once=names_once), wanted) is expected


def test_without_room_only_a_start_gives_any() -> None:
    assert (way(Loaded(), {}), way(Loaded(), A)) == (Way.NONE, Way.START)
    assert (way(Loaded(A), A), way(Loaded(A), {})) == (Way.NONE, Way.START)


def test_half_way_only_a_start_helps() -> None:
    assert way(Loaded(A, settled=False, room=True), A) is Way.START
    assert way(Loaded(A, settled=False, room=True), {}) is Way.START


@pytest.mark.parametrize(("names_once", "expected"), [(True, Way.START), (False, Way.CALLS)])
def test_a_name_that_was_gone_comes_back(names_once: bool, expected: Way) -> None:
    """The folder may hold other weights by now, and blocks of the former ones may be cached."""
    loaded = after(ROOM, A | B, names_once=names_once)
    loaded = after(loaded, B, names_once=names_once)
    assert (loaded.paths, way(loaded, B)) == (B, Way.NONE)
    assert way(loaded, A | B) is expected
