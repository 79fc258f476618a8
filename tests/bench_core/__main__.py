"""Measure the pure core and compare with the table that is kept; `--write` keeps the new one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.bench_core.measure import TABLE, compared, loop, measure, read, spent_ns, written


def main(argv: Sequence[str]) -> int:
    """Return 1 when something has become slow."""
    if any(flag != "--write" for flag in argv):
        sys.stderr.write(f"{__doc__}\n")
        return 2
    figures = measure()
    before = read(TABLE.read_text("utf-8")) if TABLE.is_file() else {}
    table, slow = compared(figures, before)
    loop_us = min(spent_ns(loop, 1000) for _ in range(20)) / 1e6
    sys.stdout.write(f"{table}one loop is {loop_us:.2f} us here\n")
    if argv:
        TABLE.write_text(written(figures), "utf-8")
        return 0
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
