"""Tables: which columns are kept, what is found by words, and that nothing is too wide."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.top.table import Cell, Column, Row, Table, filtered, fit, heading, line
from backends.top.words import width_of

TABLE = Table(
    "t",
    (
        Column("NAME"),
        Column("N", right=True, width_min=4),
        Column("POOL", rank=1),
        Column("WHY", 2),
    ),
    (
        Row("a", (Cell("alpha"), Cell("7"), Cell("first"), Cell("because of the weather today"))),
        Row("b", (Cell("beta"), Cell("12"), Cell("second"), Cell(""))),
    ),
)


def _lines(width: int) -> list[str]:
    fitted = fit(TABLE, width)
    return [heading(TABLE, fitted), *(line(TABLE, fitted, row) for row in TABLE.rows)]


def test_all_columns_where_there_is_room() -> None:
    assert _lines(80) == [
        "NAME      N  POOL    WHY",
        "alpha     7  first   because of the weather today",
        "beta     12  second",
    ]


def test_the_last_column_is_cut_before_another_goes() -> None:
    assert _lines(40)[1] == "alpha     7  first   because of the wea…"


def test_the_least_important_column_goes_first() -> None:
    assert _lines(24)[0] == "NAME      N  POOL"
    assert _lines(12)[0] == "NAME      N"


def test_what_must_stay_is_cut_where_there_is_too_little() -> None:
    assert _lines(8)[1] == "al…    7"


@given(st.integers(1, 120))
def test_no_line_is_too_wide(width: int) -> None:
    assert all(width_of(text) <= max(width, 4) for text in _lines(width))


def test_rows_are_found_by_all_words_whatever_their_case() -> None:
    def names(words: str) -> list[str]:
        return [row.name for row in filtered(TABLE, words).rows]

    assert names("") == ["a", "b"]
    assert names("FIRST") == ["a"]
    assert names("second beta") == ["b"]
    assert names("second alpha") == []
    assert filtered(TABLE, "x").empty == "nothing with 'x' in it"
