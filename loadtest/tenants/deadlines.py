"""Who meets his deadline when there is more work than can be done, and who is put off or sent away.

A whole Doherty with simulated replicas, in real time. First a flood tells the capacity. Then, at
`--overload` times that, online requests that want their first token within `--deadline-ms` come
together with offline work that says `flex`, in an open loop:

* mixed         online work is `--online` of the capacity, the rest is offline work;
* online only   all of it is online: not all can be served in time, whoever orders them.

Each is run with deadlines as they are and, as a control, with none said: then those who came first
are first. `late: shed` sends those away who can meet theirs no more, `late: serve` puts them behind
the others. Told are, of online requests that began in the measured time, how many were answered at
all, and how many of those, and of all, had their first token in time; what offline work got done;
and the counters `doherty_deadline_*_total` of the proxy.

    python -m loadtest deadlines
    python -m loadtest deadlines --repeat 1 --seconds 15 --late shed
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import orjson
import uvloop

from loadtest.client import Client
from loadtest.fleet import get, launched, local
from loadtest.measure import quantile
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.tenants.stage import DOHERTY, Setting, configuration, fleet_options, key_of
from loadtest.tenants.traffic import COMPLETE, Course, Record, Sender, send

SUMMARY = "who meets his deadline under overload, and who is put off or sent away"
TENANT = "product"
CELLS = ("mixed", "mixed, none said", "online only", "online only, none said")
MET_MIN = 0.98
PAUSE_S = 2.0
ANSWER_S = 3.0  # before the end: who begins later has no time to be answered
_COUNTER = re.compile(
    rb'^doherty_deadline_(met|missed|shed)_total\{class="online"\} ([0-9.e+]+)$', re.MULTILINE
)


class Options(Setting, frozen=True, kw_only=True):
    """The load, and how long it lasts."""

    overload: float = 1.3
    online: float = 0.8
    deadline_ms: int = 1000
    prompts: tuple[int, ...] = (1000, 2000, 4000)
    output_tokens: int = 60
    seconds: float = 25.0
    warm: float = 5.0
    repeat: int = 2
    seed: int = 1
    lates: tuple[str, ...] = ("serve", "shed")


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one cell."""

    late: str
    cell: str
    online: int  # requests that began in the measured time
    answered: int  # of them, that had a first token
    in_time: int
    shed: int  # told that it was too late
    other: int  # failed in another way
    ttft_p50_s: float
    ttft_p99_s: float
    offline_tokens_per_s: float
    counted: tuple[int, int, int]  # met, missed, shed, by the proxy


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--replicas", type=int, default=base.replicas, help="simulated (default %(default)s)")
    add("--workers", type=int, default=base.workers, help="of the proxy (default %(default)s)")
    add("--profile", default=base.profile, help="of the simulated engines (default %(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="simulated seconds a second")
    add("--chunk-tokens", type=int, default=base.chunk_tokens, help="of prompts in a step")
    add("--overload", type=float, default=base.overload, help="of the capacity (%(default)s)")
    add("--online", type=float, default=base.online, help="of it, in the mixed cell (%(default)s)")
    add("--deadline-ms", type=int, default=base.deadline_ms, help="to the first token")
    add("--seconds", type=float, default=base.seconds, help="of each cell (default %(default)s)")
    add("--warm", type=float, default=base.warm, help="of those, not measured (%(default)s)")
    add("--repeat", type=int, default=base.repeat, help="of all cells (default %(default)s)")
    add("--late", dest="lates", type=_words, default=base.lates, help="serve, shed (both)")
    add("--seed", type=int, default=base.seed, help="of arrivals and sizes")
    add("--doherty", default=DOHERTY, metavar="COMMAND", help="default: this Python's")
    add("--json", metavar="FILE", help="also write everything as JSON")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Run all cells. Raises `RunError`."""
    given = {name: getattr(args, name) for name in Options.__struct_fields__ if hasattr(args, name)}
    options = Options(**given)
    cells: list[Cell] = []
    for late in options.lates:
        cells += uvloop.run(run_all(msgspec.structs.replace(options, late=late)))
    print(table(cells, options))
    kept, lines = judge(cells)
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps([msgspec.to_builtins(cell) for cell in cells]))
    return 0 if kept else 1


async def run_all(options: Options) -> list[Cell]:
    """Return all cells of one way to treat those who are late. Raises `RunError`."""
    found: list[Cell] = []
    async with launched(
        lambda ports, folder: configuration(options, {TENANT: 1.0}, ports, folder),
        fleet_options(options),
    ) as running:
        port, admin = running.ports.proxy, running.ports.admin
        rate = await _capacity(port, options)
        print(f"late: {options.late}; capacity {rate:.1f} requests/s", file=sys.stderr)
        for turn in range(options.repeat):
            for name in CELLS:
                print(f"turn {turn + 1}: {name}", file=sys.stderr)
                course = Course(name=name, seconds=options.seconds, seed=options.seed + turn)
                before = await counted(admin)
                seen = await send(port, senders_of(name, rate, options), course)
                await asyncio.sleep(PAUSE_S)
                after = await counted(admin)
                met, missed, shed = (b - a for a, b in zip(before, after, strict=True))
                found.append(look(name, seen, options, (met, missed, shed)))
    return found


async def _capacity(port: int, options: Options) -> float:
    """Return how many requests a second are answered under a flood, once all is warm."""
    flood = _sender("all", 60.0 * options.replicas * options.time_scale, options)
    await send(port, [flood], Course(name="warm", seconds=options.seconds / 2, seed=0))
    await asyncio.sleep(PAUSE_S)
    records, begun_s, ended_s = await send(
        port, [flood], Course(name="capacity", seconds=options.seconds, seed=0)
    )
    await asyncio.sleep(PAUSE_S)
    # First tokens, since prompts are what there is too much of.
    from_s = begun_s + options.warm
    count = sum(from_s <= record.first_s < ended_s for record in records)
    if not count:
        fates = {record.fate for record in records}
        raise RunError(f"nothing was answered: {', '.join(sorted(fates))}")
    return count / (ended_s - from_s)


def _sender(name: str, rate: float, options: Options, tier: str = "", by_ms: int = 0) -> Sender:
    return Sender(
        name=name,
        key=key_of(TENANT),
        rate=rate,
        prompts=options.prompts,
        output_tokens=options.output_tokens,
        tier=tier,
        deadline_ms=by_ms,
    )


def senders_of(cell: str, rate: float, options: Options) -> list[Sender]:
    """Return who sends in a cell; `rate` is the capacity."""
    by_ms = 0 if cell.endswith("none said") else options.deadline_ms
    if cell.startswith("online only"):
        return [_sender("online", options.overload * rate, options, by_ms=by_ms)]
    return [
        _sender("online", options.online * rate, options, by_ms=by_ms),
        _sender("offline", (options.overload - options.online) * rate, options, "flex"),
    ]


async def counted(admin: int) -> tuple[int, int, int]:
    """Return how many deadlines the proxy says were met, missed and shed."""
    client = Client(local(admin), WallClock().now_s)
    with contextlib.closing(client):
        _, page = await get(client, "/metrics")
    told = {name: int(float(value)) for name, value in _COUNTER.findall(page)}
    return told.get(b"met", 0), told.get(b"missed", 0), told.get(b"shed", 0)


def look(
    cell: str,
    seen: tuple[list[Record], float, float],
    options: Options,
    told: tuple[int, int, int],
) -> Cell:
    """Return the figures of one cell, of online requests that began in the measured time."""
    records, begun_s, ended_s = seen
    from_s, to_s = begun_s + options.warm, ended_s - ANSWER_S
    online = [r for r in records if r.sender == "online" and from_s <= r.due_s < to_s]
    waits = [record.ttft_s for record in online if record.first_s]
    shed = sum("status 504" in record.fate for record in online)
    failed = sum(record.fate.startswith("failed") for record in online)
    tokens = [
        record.tokens
        for record in records
        if record.sender == "offline" and record.fate == COMPLETE and record.ended_s >= from_s
    ]
    return Cell(
        late=options.late,
        cell=cell,
        online=len(online),
        answered=len(waits),
        in_time=sum(wait <= options.deadline_ms / 1e3 for wait in waits),
        shed=shed,
        other=failed - shed,
        ttft_p50_s=quantile(waits, 0.5) or 0.0,
        ttft_p99_s=quantile(waits, 0.99) or 0.0,
        offline_tokens_per_s=sum(tokens) / (ended_s - from_s),
        counted=told,
    )


def judge(cells: Sequence[Cell]) -> tuple[bool, list[str]]:
    """Hold the figures against what was promised: of those who are served, and beside offline."""
    kept, lines = True, []
    for late in dict.fromkeys(cell.late for cell in cells):
        for name in ("mixed", "online only"):
            mine = [cell for cell in cells if (cell.late, cell.cell) == (late, name)]
            online, answered, in_time = (
                sum(getattr(cell, figure) for cell in mine)
                for figure in ("online", "answered", "in_time")
            )
            if not answered:
                continue
            of_all, of_answered = in_time / online, in_time / answered
            lines.append(
                f"late: {late}, {name}: {of_all:.1%} of online requests in time, "
                f"{of_answered:.1%} of those answered"
            )
            promised = of_all if name == "mixed" else of_answered if late == "shed" else 1.0
            kept = kept and promised >= MET_MIN
    return kept, lines


def table(cells: Sequence[Cell], options: Options) -> str:
    """Return the medians of all cells."""
    lines = [
        f"{options.overload:g} x capacity, {options.replicas} replicas, {options.workers} workers, "
        f"first token wanted within {options.deadline_ms} ms, {options.repeat} x "
        f"{options.seconds:g} s",
        "late   cell                    online  answered  in time  504  other  p50 s  p99 s  "
        "offline tokens/s  counted met/missed/shed",
    ]
    for key in dict.fromkeys((cell.late, cell.cell) for cell in cells):
        mine = [cell for cell in cells if (cell.late, cell.cell) == key]

        def middle(figure: str, of: Sequence[Cell] = mine) -> float:
            return float(statistics.median(getattr(cell, figure) for cell in of))

        told = "/".join(str(sum(cell.counted[place] for cell in mine)) for place in range(3))
        lines.append(
            f"{key[0]:<5}  {key[1]:<22}  {middle('online'):6.0f}  {middle('answered'):8.0f}  "
            f"{middle('in_time'):7.0f}  {middle('shed'):3.0f}  {middle('other'):5.0f}  "
            f"{middle('ttft_p50_s'):5.3f}  {middle('ttft_p99_s'):5.3f}  "
            f"{middle('offline_tokens_per_s'):16.0f}  {told}"
        )
    return "\n".join(lines)
