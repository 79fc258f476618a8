"""The benchmark of the core is sound: every row runs, and the kept table has every row."""

from __future__ import annotations

import pytest

from tests.bench_core import __main__ as command
from tests.bench_core.cases import CASES, Case, chat_body
from tests.bench_core.measure import TABLE, compared, digits, in_loops, loop, measure, read, written

ROWS = [(case.function, case.size) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.function} {case.size}")
def test_every_row_can_be_called_again_and_again(case: Case) -> None:
    call = case.make()
    for _ in range(3):
        call()


def test_the_kept_table_has_every_row_and_no_other() -> None:
    kept = read(TABLE.read_text("utf-8"))
    assert list(kept) == ROWS
    assert all(loops > 0 for loops in kept.values())
    assert TABLE.read_text("utf-8") == written(kept)


def test_bodies_have_their_size() -> None:
    for kilobytes in (1, 16, 128):
        assert 0.6 < len(chat_body(kilobytes)) / (1024 * kilobytes) < 1.3


def test_a_loop_costs_about_a_loop_and_ten_cost_more() -> None:
    def ten() -> None:
        for _ in range(10):
            loop()

    # In processor time, of interleaved rounds: far from what any load of the machine could do.
    one = in_loops(loop, rounds=5, round_ns=200_000)
    assert in_loops(ten, rounds=5, round_ns=200_000) > 2 * one


def test_figures_are_compared_row_by_row() -> None:
    before = {("a", "1 KB"): 10.0, ("b", ""): 2.0}
    table, slow = compared({("a", "1 KB"): 12.9, ("b", ""): 2.7, ("new", ""): 1.0}, before)
    assert slow == [("b", "")]
    assert [line.split()[-1] for line in table.splitlines()[1:]] == ["1.29", "slow", "1"]


@pytest.mark.parametrize(
    ("loops", "shown"),
    [(0.1234, "0.12"), (1.0, "1"), (9.96, "10"), (99.4, "99"), (12345.0, "12000")],
)
def test_two_digits_are_kept(loops: float, shown: str) -> None:
    assert digits(loops) == shown


@pytest.mark.parametrize(("argv", "status"), [([], 1), (["--write"], 0), (["--x"], 2)])
def test_a_slow_row_fails_the_command(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    argv: list[str],
    status: int,
) -> None:
    table = tmp_path_factory.mktemp("bench") / "core.txt"
    table.write_text(written({("a", ""): 1.0}))
    monkeypatch.setattr(command, "TABLE", table)
    monkeypatch.setattr(command, "measure", lambda: {("a", ""): 2.0})
    assert command.main(argv) == status
    assert read(table.read_text()) == {("a", ""): 2.0 if argv == ["--write"] else 1.0}


def test_measuring_gives_a_figure_a_row() -> None:
    quick = [Case("nothing", "", lambda: lambda: None)]
    ((row, loops),) = measure(quick).items()
    assert row == ("nothing", "")
    assert 0 < loops < 1
