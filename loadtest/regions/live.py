"""Three real Doherties on one machine, in network namespaces that relays join.

Each pair of regions is a round trip apart (5, 80 and 160 ms): a relay adds half of it to each
direction. Requests begin in an open loop and follow conversations. In turn:

1. calm: every region at half of what it can serve. How much stays where it came.
2. overload: one region gets twice what it can serve, the others a third. Its time to first token,
   against three islands under the same load; runs alternate.
3. kill: a region that serves others' requests is killed (SIGKILL, all of it), and comes back.
4. cut: every packet between two regions is dropped (iptables), and then no longer.
5. residency: keys that may be served in one region only, sent to all of them.

Asked: at least 95 % stay below saturation; p99 under overload at most half of staying local; no
request is lost that had not begun, which it has when the head of its answer has come; nothing
travels twice; residency is never broken.

    sudo python -m loadtest regions live
    sudo python -m loadtest regions live --steps calm,residency --residency 100000
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import msgspec

from loadtest.regions import land
from loadtest.regions.stage import Region, Shape, cut_pair, difference, key_of, regions
from loadtest.regions.traffic import (
    COMPLETE,
    Ask,
    Request,
    all_load,
    at_home,
    body_of,
    load,
    saturated_per_s,
    send,
    ttft_s,
)
from loadtest.run import RunError

SUMMARY = "three real Doherties: calm, overload, a kill, a cut, residency"
STEPS = ("calm", "overload", "kill", "cut", "residency")
LOCAL_SHARE_MIN = 0.95
OVERLOAD_RATIO_MAX = 0.5
RECOVERY_S_MAX = 5.0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and how much. Seconds are of this machine's clock."""

    seconds: float = 40.0  # of each measured part
    pairs: int = 1  # of overload runs
    residency: int = 2000
    overload: float = 2.0
    max_inputs: int = 16
    time_scale: float = 0.25
    seed: int = 1
    steps: str = ",".join(STEPS)


class Line(msgspec.Struct, frozen=True):
    """One thing that was asked, and what was found."""

    step: str
    asked: str
    found: str
    kept: bool


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(), command.add_argument
    add("--steps", default=base.steps, help="default %(default)s")
    add("--seconds", type=float, default=base.seconds, help="of each part (%(default)s)")
    add("--pairs", type=int, default=base.pairs, help="overload runs each way (%(default)s)")
    add("--residency", type=int, default=base.residency, help="requests (default %(default)s)")
    add("--overload", type=float, default=base.overload, help="times capacity (%(default)s)")
    add("--max-inputs", type=int, default=base.max_inputs, help="of each replica (%(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="simulated seconds a second")
    add("--seed", type=int, default=base.seed, help="of arrivals")
    add("--keep", metavar="FOLDER", help="where logs stay (default: nowhere)")


def run(args: argparse.Namespace) -> int:
    """Run all steps. Raises `RunError`."""
    setting = Setting(**{name: getattr(args, name) for name in Setting.__struct_fields__})
    unknown = set(setting.steps.split(",")) - set(STEPS)
    if unknown:
        raise RunError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    land.enter(sys.argv[1:])
    if args.keep:
        lines = asyncio.run(run_steps(setting, Path(args.keep)))
    else:
        with tempfile.TemporaryDirectory(prefix="doherty-regions-") as folder:
            lines = asyncio.run(run_steps(setting, Path(folder)))
    print(table(lines))
    return 0 if all(line.kept for line in lines) else 1


async def run_steps(setting: Setting, folder: Path) -> list[Line]:
    """Return what was found. Raises `RunError`."""
    steps, ask = setting.steps.split(","), Ask()
    lines: list[Line] = []
    shape = Shape(max_inputs=setting.max_inputs, time_scale=setting.time_scale)
    rate = 0.0
    islands: list[Request] = []
    shared: list[Request] = []
    for pair in range(setting.pairs if "overload" in steps else 0):
        lonely = msgspec.structs.replace(shape, linked=False)
        async with regions(lonely, folder / f"islands-{pair}") as three:
            rate = rate or await _capacity(three[0], setting, ask)
            islands += await _overload(three, rate, setting, ask, pair)
        async with regions(shape, folder / f"shared-{pair}") as three:
            await _linked(three)
            shared += await _overload(three, rate, setting, ask, pair)
    if "overload" in steps:
        lines += judge_overload(islands, shared)
    if set(steps) - {"overload"}:
        async with regions(shape, folder / "steps") as three:
            await _linked(three)
            rate = rate or await _capacity(three[0], setting, ask)
            if "calm" in steps:
                lines += await calm(three, rate, setting, ask)
            if "kill" in steps:
                lines += await kill(three, rate, setting, ask)
            if "cut" in steps:
                lines += await cut(three, rate, setting, ask)
            if "residency" in steps:
                lines += await residency(three, setting)
    return lines


async def _capacity(region: Region, setting: Setting, ask: Ask) -> float:
    rate = await saturated_per_s(region, setting.max_inputs, setting.seconds / 2, ask)
    print(f"a region serves {rate:.2f} requests a second", file=sys.stderr)
    if not rate:
        raise RunError("a region serves nothing")
    return rate


async def _linked(three: list[Region]) -> None:
    """Wait until every region sees every other."""
    for _ in range(200):
        seen = [await region.metrics() for region in three]
        if all(
            sum(value for name, value in one.items() if name.startswith("doherty_remote_linked"))
            >= len(three) - 1
            for one in seen
        ):
            return
        await asyncio.sleep(0.1)
    raise RunError("the regions are not linked after 20 s")


# --- the steps ------------------------------------------------------------------------------------


async def calm(three: list[Region], rate: float, setting: Setting, ask: Ask) -> list[Line]:
    print("calm", file=sys.stderr)
    rates = [0.5 * rate] * len(three)
    found = await all_load(three, rates, setting.seconds, ask, setting.seed)
    lost = [request for request in found if request.fate != COMPLETE]
    share = at_home(found)
    return [
        Line("calm", f">= {LOCAL_SHARE_MIN:.0%} stay", f"{share:.1%}", share >= LOCAL_SHARE_MIN),
        Line("calm", "none lost", f"{len(lost)} of {len(found)}{_fates(lost)}", not lost),
        Line(
            "calm", "", f"TTFT p50 {ttft_s(found, 0.5):.3f} s p99 {ttft_s(found, 0.99):.3f} s", True
        ),
    ]


async def _overload(
    three: list[Region], rate: float, setting: Setting, ask: Ask, pair: int
) -> list[Request]:
    print("overload", file=sys.stderr)
    rates = [setting.overload * rate] + [rate / 3] * (len(three) - 1)
    return await all_load(three, rates, setting.seconds, ask, setting.seed + pair)


def judge_overload(islands: list[Request], shared: list[Request]) -> list[Line]:
    lines = []
    hot = islands[0].home if islands else ""
    ours = [request for request in shared if request.home == hot]
    theirs = [request for request in islands if request.home == hot]
    p99, p99_alone = ttft_s(ours, 0.99), ttft_s(theirs, 0.99)
    ratio = p99 / p99_alone if p99_alone else 1.0
    lines.append(
        Line(
            "overload",
            f"its p99 <= {OVERLOAD_RATIO_MAX:g} x that of staying",
            f"{p99:.2f} s against {p99_alone:.2f} s: {ratio:.2f} x "
            f"(p50 {ttft_s(ours, 0.5):.2f} against {ttft_s(theirs, 0.5):.2f}); "
            f"{at_home(ours):.0%} at home",
            ratio <= OVERLOAD_RATIO_MAX,
        )
    )
    for name in sorted({request.home for request in shared} - {hot}):
        near = [request for request in shared if request.home == name]
        alone = [request for request in islands if request.home == name]
        found = f"p99 {ttft_s(near, 0.99):.2f} s against {ttft_s(alone, 0.99):.2f} s"
        lines.append(Line("overload", "", f"region {name}: {found}", True))
    failed = [request for request in shared if request.fate != COMPLETE]
    lines.append(Line("overload", "none lost", f"{len(failed)}{_fates(failed)}", not failed))
    return lines


async def kill(three: list[Region], rate: float, setting: Setting, ask: Ask) -> list[Line]:
    """The second region helps the first; it dies, and comes back."""
    print("kill", file=sys.stderr)
    first, second, third = three
    rates = {first.name: 1.4 * rate, third.name: 0.3 * rate}
    moments: dict[str, float] = {}

    async def fate() -> None:
        await asyncio.sleep(setting.seconds / 4)
        moments["killed"] = first.clock.now_s()
        await second.kill()
        await asyncio.sleep(setting.seconds / 4)
        await second.start()
        await second.until_ready()
        moments["ready"] = first.clock.now_s()

    async with asyncio.TaskGroup() as group:
        group.create_task(fate())
        tasks = [
            group.create_task(
                load(region, rates[region.name], setting.seconds * 1.5, ask, setting.seed + 7)
            )
            for region in (first, third)
        ]
    found = [request for task in tasks for request in task.result()]
    return _told("kill", found, moments["killed"], second.name) + _return(
        "kill", found, moments["ready"], second.name
    )


async def cut(three: list[Region], rate: float, setting: Setting, ask: Ask) -> list[Line]:
    """The first region needs the second; nothing comes through between them, and then does."""
    print("cut", file=sys.stderr)
    first, second, third = three
    rates = [1.4 * rate, 0.3 * rate, 0.3 * rate]
    moments: dict[str, float] = {}

    async def fate() -> None:
        await asyncio.sleep(setting.seconds / 3)
        moments["cut"] = first.clock.now_s()
        cut_pair(first, second)
        await asyncio.sleep(setting.seconds / 3)
        cut_pair(first, second, heal=True)
        moments["healed"] = first.clock.now_s()

    async with asyncio.TaskGroup() as group:
        group.create_task(fate())
        work = group.create_task(
            all_load([first, second, third], rates, setting.seconds * 1.5, ask, setting.seed + 8)
        )
    found = [request for request in work.result() if request.home != second.name]
    return _told("cut", found, moments["cut"], second.name) + _return(
        "cut", found, moments["healed"], second.name
    )


def _told(step: str, found: list[Request], moment_s: float, gone: str) -> list[Line]:
    """Judge what others met whose region lost a neighbour."""
    lost = [request for request in found if request.lost]
    broken = [request for request in found if request.broken]
    helped = sum(request.region == gone for request in found if request.begun_s < moment_s)
    slow = [r for r in found if moment_s - 2 < r.begun_s < moment_s + RECOVERY_S_MAX]
    last_s = max([r.ended_s - moment_s for r in (*lost, *broken)], default=0.0)
    return [
        Line(step, "none lost that had not begun", f"{len(lost)}{_fates(lost)}", not lost),
        Line(
            step,
            f"the last failure within {RECOVERY_S_MAX:g} s",
            f"{last_s:.2f} s; {len(broken)} answers cut, {helped} served there before",
            last_s <= RECOVERY_S_MAX and helped > 0,
        ),
        Line(step, "", f"TTFT p99 around it {ttft_s(slow, 0.99):.2f} s", True),
    ]


def _return(step: str, found: list[Request], moment_s: float, name: str) -> list[Line]:
    """Say when the region was used again."""
    back = [r.begun_s - moment_s for r in found if r.region == name and r.first_s > moment_s]
    words = f"{max(0.0, min(back)):.2f} s after; {len(back)} served there" if back else "never"
    kept = bool(back) and min(back) <= RECOVERY_S_MAX
    return [Line(step, f"used again within {RECOVERY_S_MAX:g} s", words, kept)]


async def residency(three: list[Region], setting: Setting) -> list[Line]:
    """Keys of each region, sent to all; each answer says where it was computed."""
    print("residency", file=sys.stderr)
    names = [region.name for region in three]
    clients = {(r.name, name): r.client_with(key_of(name)) for r in three for name in names}
    before = [await region.metrics() for region in three]
    wrong: list[Request] = []
    counts: Counter[str] = Counter()
    elsewhere = [0, 0]
    numbers = iter(range(setting.residency))
    ask = Ask(prompt_words=8, output_tokens=1, turns=1)

    async def one() -> None:
        for number in numbers:
            at, key = three[number % len(three)], names[number // len(three) % len(names)]
            request = Request(home=at.name, begun_s=at.clock.now_s())
            await send(clients[at.name, key], request, body_of(ask, f"resident-{key}", number))
            counts[request.fate] += 1
            if request.region not in ("", key) or (request.fate == COMPLETE and not request.region):
                wrong.append(request)
            elsewhere[request.region != request.home] += request.fate == COMPLETE

    async with asyncio.TaskGroup() as group:
        for _ in range(24):
            group.create_task(one())
    for client in clients.values():
        client.close()
    after = [await region.metrics() for region in three]
    crossed = sum(
        difference(*pair, "doherty_hops_arrived_total") for pair in zip(before, after, strict=True)
    )
    served = counts[COMPLETE]
    fates = ", ".join(f"{count} {fate}" for fate, count in counts.most_common(4))
    return [
        Line(
            "residency",
            "never broken",
            f"{len(wrong)} of {served} answers",
            not wrong and served > 0,
        ),
        Line(
            "residency",
            "nothing travels twice",
            f"{crossed:.0f} hops for {elsewhere[1]} answers from elsewhere",
            crossed == elsewhere[1],
        ),
        Line("residency", "", fates, True),
    ]


def _fates(requests: list[Request]) -> str:
    counts = Counter(request.fate for request in requests)
    return f" ({', '.join(f'{n} {fate}' for fate, n in counts.most_common(3))})" if counts else ""


def table(lines: list[Line]) -> str:
    """Return what was found, one line each."""
    rows = [
        f"{'ok  ' if line.kept else 'FAIL'} {line.step:<10} {line.asked:<38} {line.found}"
        for line in lines
    ]
    return "\n".join([f"{os.cpu_count()} processors", *rows])
