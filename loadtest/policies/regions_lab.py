"""Is it worth crossing: three regions that share, against three islands, in virtual time.

Each region has its own conversations. Below saturation nearly all of them should stay where they
came; with one region in a surge, what leaves it should spare those who come there the queue, and
cost those of the other regions little. See `loadtest.policies.land` for what is modelled.

example:
  python -m loadtest regions-lab
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from loadtest import report
from loadtest.measure import quantile
from loadtest.policies.cells import Source, full_rate
from loadtest.policies.land import Ground, Land, Trip
from loadtest.policies.synthetic import SYNTHETIC
from loadtest.policies.workload import Job, Picked, Workload

SUMMARY = "three regions that share their load against three islands, in virtual time"
AFTER_SHARE = 0.1  # of each region's requests, while caches are empty


# The rate at which the project's own choice has a region's replicas full, in rates at which round
# robin has: the one keeps conversations where their prefixes are, the other computes them anew.
FULL = {"shared-head": 1.75, "nothing-shared": 1.1}


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """How busy each region is: 1 is as much as its replicas can do."""

    name: str
    loads: tuple[float, ...]


SCENES = (
    Scene(name="quiet", loads=(0.4, 0.4, 0.4)),
    Scene(name="all nearly full", loads=(0.85, 0.85, 0.85)),
    Scene(name="one over", loads=(1.15, 0.4, 0.4)),
    Scene(name="one far over", loads=(1.45, 0.4, 0.4)),
    Scene(name="all over", loads=(1.1, 1.1, 1.1)),
)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients of one region saw."""

    region: str
    requests: int
    local_share: float
    ttft_p50_s: float
    ttft_p99_s: float
    hit: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One scene, shared and as islands."""

    scene: Scene
    shared: list[Seen]
    islands: list[Seen]


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--workload", choices=tuple(SYNTHETIC), default="shared-head")
    add("--requests", type=int, default=3000, metavar="N", help="of each region (default 3000)")
    add("--replicas", type=int, default=4, metavar="N", help="of each region (default 4)")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0; 2 when it cannot begin as asked."""
    if args.requests < 100 or args.replicas < 1:
        print("loadtest: regions-lab: --requests from 100, --replicas from 1", file=sys.stderr)
        return 2
    outcomes = []
    print(f"{args.workload}, {args.requests} requests and {args.replicas} replicas in each region")
    print(HEADING)
    for scene in SCENES:
        outcome = play(scene, args.workload, args.requests, args.replicas)
        outcomes.append(outcome)
        print(rows(outcome), flush=True)
    if args.json:
        value = {"outcomes": msgspec.to_builtins(outcomes)}
        Path(args.json).write_bytes(report.to_json(value))
    return 0


def play(scene: Scene, workload: str, requests: int, replicas: int) -> Outcome:
    """Return what clients see in a scene, with and without the other regions."""
    ground = Ground(replicas=replicas)
    jobs, origins = jobs_of(scene, workload, requests, ground)
    found = {}
    for linked in (True, False):
        land = Land(jobs, origins, msgspec.structs.replace(ground, linked=linked))
        land.run()
        found[linked] = [seen(land.trips, number, ground) for number in range(len(ground.regions))]
    return Outcome(scene=scene, shared=found[True], islands=found[False])


def jobs_of(
    scene: Scene, workload: str, requests: int, ground: Ground
) -> tuple[Workload, list[int]]:
    """Return the requests of all regions by the time of their arrival, and where each comes."""
    merged: list[tuple[float, int, Job]] = []
    for number, load in enumerate(scene.loads):
        source = Source(name=workload, picked=Picked(limit=requests, seed=number + 1))
        own = SYNTHETIC[workload](requests, number + 1)
        rate = (
            load * FULL[workload] * full_rate(source, ground.cache_tokens, "mixed", ground.replicas)
        )
        scale = rate * own.span_s / len(own.jobs)
        merged += [(job.at_s / scale, number, job) for job in own.jobs]
    # The scene lasts as long as the busiest region's requests do.
    end_s = min(
        max(at_s for at_s, number, _ in merged if number == each)
        for each in range(len(scene.loads))
    )
    merged = sorted((e for e in merged if e[0] <= end_s), key=lambda entry: (entry[0], entry[1]))
    jobs, origins = [], []
    for index, (at_s, number, job) in enumerate(merged):
        jobs.append(_moved(job, index, at_s, number))
        origins.append(number)
    return Workload(workload, jobs, closed_loop=False), origins


def _moved(job: Job, index: int, at_s: float, region: int) -> Job:
    """Return a job of one region: it has nothing in common with another's but the head of all."""
    apart = (region + 1) << 60
    head = job.head_blocks
    blocks = (*job.blocks[:head], *[block | apart for block in job.blocks[head:]])
    moved = Job(index, job.session | apart, blocks, tokens=(job.prompt_tokens, job.output_tokens))
    moved.at_s, moved.head_blocks, moved.earlier = at_s, head, job.earlier
    moved.opener = job.opener | apart
    return moved


def seen(trips: list[Trip], region: int, ground: Ground) -> Seen:
    own = [trip for trip in trips if trip.origin == region]
    own = own[int(len(own) * AFTER_SHARE) :]
    ttfts_s = [trip.ttft_s for trip in own]
    tokens = sum(trip.flight.job.prompt_tokens for trip in own)
    return Seen(
        region=ground.regions[region],
        requests=len(own),
        local_share=sum(trip.abroad < 0 for trip in own) / max(1, len(own)),
        ttft_p50_s=quantile(ttfts_s, 0.5) or 0.0,
        ttft_p99_s=quantile(ttfts_s, 0.99) or 0.0,
        hit=sum(trip.flight.cached_tokens for trip in own) / max(1, tokens),
    )


HEADING = (
    f"{'scene':<18}{'region':<8}{'load':>5}{'requests':>10}{'stay':>8}"
    f"{'p50 s':>9}{'island':>9}{'p99 s':>9}{'island':>9}{'ratio':>8}{'hit':>7}{'island':>8}"
)


def rows(outcome: Outcome) -> str:
    out = []
    for load, one, island in zip(outcome.scene.loads, outcome.shared, outcome.islands, strict=True):
        out.append(
            f"{outcome.scene.name:<18}{one.region:<8}{load:>5.2f}{one.requests:>10}"
            f"{one.local_share:>8.1%}{one.ttft_p50_s:>9.3f}{island.ttft_p50_s:>9.3f}"
            f"{one.ttft_p99_s:>9.3f}{island.ttft_p99_s:>9.3f}"
            f"{one.ttft_p99_s / max(1e-9, island.ttft_p99_s):>8.2f}"
            f"{one.hit:>7.1%}{island.hit:>8.1%}"
        )
    return "\n".join(out)
