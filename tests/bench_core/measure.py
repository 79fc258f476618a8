"""How it is measured: processor time relative to a loop that is timed in the same breath.

A microsecond here is another one there; the ratio to a fixed loop of Python and of hashing holds
across machines as far as their interpreters do. Each figure is the least of many rounds, with a
round of the loop before each, so that a busy machine disturbs both or neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from xxhash import xxh3_64_intdigest

from tests.bench_core.cases import CASES, Call, Case

TABLE = Path(__file__).parents[2] / "loadtest" / "results" / "core.txt"
ROUND_NS = 2_000_000
ROUNDS = 30
REGRESSION = 1.3  # times as long as the table says; noise of a shared machine stays below
HEADING = f"{'function':22}{'size':14}{'loops':>8}"
_KIB = bytes(range(256)) * 4
_WORDS = tuple(b"word-%d" % number for number in range(16))

Row = tuple[str, str]


def loop() -> int:
    """Do a fixed piece of work: some of what the core's functions are made of."""
    seen: dict[bytes, int] = {}
    for word in _WORDS:
        name, _, number = word.partition(b"-")
        seen[word] = len(name) + int(number)
    return xxh3_64_intdigest(_KIB) ^ len(seen)


def spent_ns(call: Call, times: int) -> int:
    begun_ns = time.process_time_ns()
    for _ in range(times):
        call()
    return time.process_time_ns() - begun_ns


def times_for(call: Call, round_ns: int) -> int:
    """Return how many calls fill a round."""
    times = 1
    while spent_ns(call, times) < round_ns:
        times *= 2
    return times


def in_loops(call: Call, rounds: int = ROUNDS, round_ns: int = ROUND_NS) -> float:
    """Return what one call costs, in loops."""
    loop_times, times = times_for(loop, round_ns), times_for(call, round_ns)
    loops_ns, calls_ns = [], []
    for _ in range(rounds):
        loops_ns.append(spent_ns(loop, loop_times) / loop_times)
        calls_ns.append(spent_ns(call, times) / times)
    return min(calls_ns) / min(loops_ns)


def measure(cases: Iterable[Case] = CASES) -> dict[Row, float]:
    return {(case.function, case.size): in_loops(case.make()) for case in cases}


def digits(loops: float) -> str:
    """Two digits that count: more would change with every run."""
    return f"{loops:.2g}" if loops < 100 else f"{round(loops, 2 - len(str(int(loops)))):.0f}"


def written(figures: Mapping[Row, float]) -> str:
    """Return the table that is kept beside the code."""
    lines = ["The pure core, in reference loops a call; `make bench-core ARGS=--write` wrote this."]
    lines.append(HEADING)
    for (function, size), loops in figures.items():
        lines.append(f"{function:22}{size:14}{digits(loops):>8}")
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[Row, float]:
    """Return the figures of a written table."""
    figures: dict[Row, float] = {}
    for line in text.splitlines()[2:]:
        figures[line[:22].rstrip(), line[22:36].rstrip()] = float(line[36:])
    return figures


def compared(figures: Mapping[Row, float], before: Mapping[Row, float]) -> tuple[str, list[Row]]:
    """Return a table of now and before, and the rows that have become slow."""
    lines = [f"{HEADING}{'before':>8}{'ratio':>8}"]
    slow: list[Row] = []
    for (function, size), loops in figures.items():
        line = f"{function:22}{size:14}{digits(loops):>8}"
        was = before.get((function, size))
        if was is not None:
            ratio = loops / was
            line += f"{digits(was):>8}{ratio:>8.2f}"
            if ratio > REGRESSION:
                slow.append((function, size))
        lines.append(line + ("  slow" if (function, size) in slow else ""))
    return "\n".join(lines) + "\n", slow
