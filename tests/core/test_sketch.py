"""Heavy hitters: the frequent are found, the rest is forgotten, and space is bounded."""

from __future__ import annotations

import random

from proxy.core import limits
from proxy.core.sketch import HotPrefixes


def test_a_head_of_many_requests_is_hot_among_thousands_that_are_not() -> None:
    draw = random.Random(1)
    hot = HotPrefixes()
    for number in range(20_000):
        hot.count(7 if draw.random() < 2 * limits.HOT_SHARE else 1000 + number)
    assert hot.is_hot(7)
    assert not any(hot.is_hot(1000 + number) for number in range(20_000))
    assert len(hot._counts) <= limits.HOT_COUNTERS_MAX


def test_what_was_hot_cools() -> None:
    hot = HotPrefixes()
    for _ in range(1000):
        hot.count(7)
    assert hot.is_hot(7)
    for number in range(4 * limits.HOT_WINDOW_MAX):
        hot.count(8 + number % 3)
    assert not hot.is_hot(7)
    assert hot.is_hot(8)


def test_a_few_requests_are_no_part_of_many() -> None:
    hot = HotPrefixes()
    for _ in range(limits.HOT_COUNT_MIN - 1):
        hot.count(7)
    assert not hot.is_hot(7)
    hot.count(7)
    assert hot.is_hot(7)
