"""Numbers in words: units, unknowns, and what would move a terminal's cursor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.top import words

SECONDS = [
    (None, "-"),
    (0.0, "0 ms"),
    (0.00004, "0 ms"),
    (0.00512, "5.1 ms"),
    (0.0123, "12 ms"),
    (0.9994, "999 ms"),
    (0.9996, "1.00 s"),
    (9.994, "9.99 s"),
    (9.996, "10.0 s"),
    (99.96, "100 s"),
    (599.0, "599 s"),
    (601.0, "10 min"),
    (36_001.0, "10 h"),
    (1_000_000.0, "11 d"),
]


@pytest.mark.parametrize(("value", "text"), SECONDS, ids=[case[1] for case in SECONDS])
def test_seconds(value: float | None, text: str) -> None:
    assert words.seconds(value) == text


def test_rates_and_counts_and_octets() -> None:
    assert [words.rate(x) for x in (None, 0.0, 0.001, 0.5, 12.34, 123.4, 12_345.0)] == [
        *("-", "0", "<.01", "0.50", "12.3", "123", "12.3k")
    ]
    assert [words.count(x) for x in (None, 0, 9_999, 10_000, 999_949, 1e9)] == [
        *("-", "0", "9999", "10.0k", "1.0M", "1.0G")
    ]
    assert [words.octets(x) for x in (None, 0, 1023, 1024, 5 * 1024**3)] == [
        *("-", "0 B", "1023 B", "1.0 KiB", "5.0 GiB")
    ]


@given(st.floats(0, 1e15))
def test_no_number_is_wider_than_its_column(value: float) -> None:
    assert len(words.rate(value)) <= 6
    assert len(words.count(value)) <= 6
    assert len(words.octets(value)) <= 9
    assert len(words.seconds(min(value, 1e9))) <= 7


def test_a_bar_tells_little_from_nothing_and_nearly_full_from_full() -> None:
    bars = [words.bar(x, 4, ascii_only=True) for x in (0.0, 0.01, 0.5, 0.99, 1.0, 7.0)]
    assert bars == ["....", "#...", "##..", "###.", "####", "####"]
    assert words.bar(None, 4) == "    "


def test_an_escape_sequence_in_a_name_is_shown_and_not_obeyed() -> None:
    assert words.printable("m\x1b[2J\nx") == "m�[2J�x"
    assert words.printable("right\u202eleft") == "right�left"
    assert words.printable("modèle-模型") == "modèle-模型"


@given(st.text(alphabet="ab模é́", max_size=12), st.integers(0, 14))
def test_what_is_cut_fits(text: str, width: int) -> None:
    shown = words.cut(text, width)
    assert words.width_of(shown) <= width
    assert shown == text or words.width_of(text) > width
