"""Heavy hitters: the frequent are found, the rest is forgotten, and space is bounded."""

from __future__ import annotations

import random

from proxy.core import limits
from proxy.core.sketch import HotPrefixes

_CACHE = 1_000_000


def test_a_head_of_many_requests_is_hot_among_thousands_that_are_not() -> None:
    draw = random.Random(1)
    hot = HotPrefixes()
    for number in range(20_000):
        hot.count(7 if draw.random() < 2 * limits.HOT_SHARE else 1000 + number)
    assert hot.is_hot(7, 1000, _CACHE)
    assert not any(hot.is_hot(1000 + number, 1000, _CACHE) for number in range(20_000))
    assert len(hot._counts) <= limits.HOT_COUNTERS_MAX


def test_what_was_hot_cools() -> None:
    hot = HotPrefixes()
    for _ in range(1000):
        hot.count(7)
    assert hot.is_hot(7, 1000, _CACHE)
    for number in range(4 * limits.HOT_WINDOW_MAX):
        hot.count(8 + number % 3)
    assert not hot.is_hot(7, 1000, _CACHE)
    assert hot.is_hot(8, 1000, _CACHE)


def test_a_few_requests_are_no_part_of_many() -> None:
    hot = HotPrefixes()
    for _ in range(limits.HOT_COUNT_MIN - 1):
        hot.count(7)
    assert not hot.is_hot(7, 1000, _CACHE)
    hot.count(7)
    assert hot.is_hot(7, 1000, _CACHE)


def test_what_caches_cannot_spare_the_room_for_stays_where_it_is() -> None:
    hot = HotPrefixes()
    for number in range(1000):  # ten documents, each as frequent as the others
        hot.count(number % 10)
    most = int(limits.HOT_CACHE_SHARE * _CACHE / 10)
    assert hot.is_hot(3, most - 1, _CACHE)
    assert not hot.is_hot(3, most + 1000, _CACHE)


def test_the_hottest_are_told_with_their_length() -> None:
    hot, measured = HotPrefixes(), 0
    for name, times in ((1, 9), (2, 30), (3, 3)):
        for _ in range(times):
            if hot.count(name):
                hot.measure(name, 100 * name)
                measured += 1
    assert measured == 2  # the third is too rare
    assert hot.hottest(5) == [(2, 30, 200), (1, 9, 100)]
    assert hot.hottest(1) == [(2, 30, 200)]


def test_lengths_are_forgotten_with_their_counts() -> None:
    hot = HotPrefixes()
    for name in range(50 * limits.HOT_COUNTERS_MAX):
        for _ in range(limits.HOT_COUNT_MIN):
            if hot.count(name):
                hot.measure(name, 1)
    assert len(hot._octets) <= 2 * limits.HOT_COUNTERS_MAX
