"""How much of request bodies may be held, by the memory that there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.memory import bodies_bytes_max, group_room_bytes, machine_room_bytes

MIB = limits.MIB


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "room"),
    [
        ("max\n", "5\n", "", None),
        ("", "", "", None),
        ("100\n", "30\n", "", 70),
        ("100\n", "30\n", "anon 1\ninactive_file 20\n", 90),
        ("100\n", "30\n", "inactive_file 1\ntotal_inactive_file 20\n", 90),
        ("100\n", "130\n", "", 0),
        ("100\n", "10\n", "inactive_file 20\n", 100),
        ("100\n", "", "", 100),
    ],
)
def test_the_room_in_a_group(limit: str, usage: str, stat: str, room: int | None) -> None:
    assert group_room_bytes(limit, usage, stat) == room


def test_the_room_in_a_machine() -> None:
    assert machine_room_bytes("MemTotal:  9 kB\nMemAvailable:   3 kB\n") == 3 * limits.KIB
    assert machine_room_bytes("MemTotal:  9 kB\n") is None


@pytest.mark.parametrize(
    ("rooms", "workers", "body_mib", "mib"),
    [
        ([], 1, 32, 1024),
        ([None], 1, 32, 1024),
        ([24_000 * MIB, None], 2, 32, 1024),
        ([24_000 * MIB, 432 * MIB, None], 1, 32, 200),
        ([432 * MIB], 2, 16, 100),
        ([64 * MIB], 1, 64, 16),
        ([0], 4, 32, 0),
    ],
)
def test_the_bound_leaves_room_for_all_workers(
    rooms: list[int | None], workers: int, body_mib: int, mib: int
) -> None:
    bound = bodies_bytes_max(rooms, workers, body_mib * MIB)
    assert bound == min(mib * MIB, limits.BODIES_BYTES_MAX)


@given(st.integers(0, 1 << 40), st.integers(1, 64), st.integers(1, 1 << 32))
def test_all_bodies_and_one_copy_fit_or_are_a_quarter(room: int, workers: int, body: int) -> None:
    bound = bodies_bytes_max([room], workers, body)
    held = bound * workers
    assert held <= room // 4 or 2 * held + workers * body <= room
