"""Many runs, on several processors, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import msgspec

from loadtest.policies.cells import Cell, Figures, goodput, run_cell, workload_of


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One policy in one cell: its figures; or, with a limit, its goodput under that limit."""

    cell: Cell
    policy: str
    ttft_s_max: float = 0.0


Result = Figures | float


def run_task(task: Task) -> Result:
    if task.ttft_s_max:
        return goodput(task.cell, task.policy, task.ttft_s_max)
    return run_cell(task.cell, task.policy)


def run_tasks(
    tasks: Sequence[Task], processes: int, say: Callable[[str], None]
) -> dict[Task, Result]:
    """Return what each task gave. Workloads read before are not read again by the children."""
    if processes <= 1:
        results: dict[Task, Result] = {}
        for task in tasks:
            results[task] = run_task(task)
            say(f"{len(results)}/{len(tasks)} {described(task)}")
        return results
    with ProcessPoolExecutor(processes) as pool:
        futures: dict[Task, Future[Result]] = {task: pool.submit(run_task, task) for task in tasks}
        try:
            for place, (task, future) in enumerate(futures.items(), 1):
                future.result()
                say(f"{place}/{len(tasks)} {described(task)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {task: future.result() for task, future in futures.items()}


def described(task: Task) -> str:
    wanted = "goodput of " if task.ttft_s_max else ""
    return f"{label(task.cell)}: {wanted}{task.policy}"


def label(cell: Cell) -> str:
    """Return a cell in words: what differs from the usual one is named."""
    name = cell.source.name.rsplit("/", 1)[-1].split(".")[0]
    closed = workload_of(cell.source).closed_loop
    load = f"{cell.source.picked.users} users" if closed else f"load={cell.load:.0%}"
    words = [f"{name} N={cell.replicas} cache={in_words(cell.cache_tokens)} {load}"]
    usual = Cell()
    for field, text in (
        ("model", "{}"),
        ("proxies", "{} proxies"),
        ("sharing", "sharing {}"),
        ("note_delay_s", "notes take {:g} s"),
        ("scrape_s", "gauges every {:g} s"),
        ("believed", "cache believed x{:g}"),
        ("slow", "one at {:g} of the speed"),
        ("points", "points {}"),
        ("after", "after {} requests"),
        ("seed", "seed {}"),
    ):
        value: Any = getattr(cell, field)
        if value != getattr(usual, field):
            words.append(text.format(value))
    if cell.burst:
        burst = cell.burst
        words.append(f"burst x{burst.factor:g}, {burst.before} replicas for {burst.cold_s:g} s")
    return ", ".join(words)


def in_words(tokens: int) -> str:
    """Return a number of tokens as people write it."""
    return f"{tokens / 1e6:g}M" if tokens >= 1_000_000 else f"{tokens / 1e3:g}k"
