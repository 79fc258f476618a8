"""What tenants and classes take from each other, in virtual time: no machine is in the way.

The scenes of `loadtest fairness`, on modelled replicas: one tenant at 0.8 of its share alone,
beside another that sends as much, and beside one that sends ten times its share; and online work at
0.7 and 0.95 of what the replicas do, alone and beside a flood of offline work. See
`loadtest.policies.claims` for what is modelled.

example:
  python -m loadtest claims-lab
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence

import msgspec

from loadtest.measure import quantile
from loadtest.policies.claims import Claimant, Scene, Stage
from proxy.core.classes import OFFLINE

SUMMARY = "what tenants and classes take from each other, in virtual time"
FLOOD_RATE = 60.0
HEADING = f"{'scene':<22}{'sender':<9}{'requests':>9}{'p50 s':>9}{'p99 s':>9}{'tokens/s':>10}"


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one sender had."""

    sender: str
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    tokens_per_s: float


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--seconds", type=float, default=50.0, help="of each scene (default %(default)s)")
    add("--workers", type=int, default=4, help="of the proxy (default %(default)s)")
    add("--seed", type=int, default=1, help="of arrivals and sizes")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0; 2 when it cannot begin as asked."""
    if args.seconds < 5.0 or args.workers < 1:
        print("loadtest: claims-lab: --seconds from 5, --workers from 1", file=sys.stderr)
        return 2
    scene = Scene(seconds=args.seconds, workers=args.workers, seed=args.seed)
    flood = Claimant(name="all", tenant="a", rate=FLOOD_RATE)
    capacity = play([flood], scene)[0].tokens_per_s
    print(f"capacity {capacity:.0f} tokens/s, {scene.workers} workers, {scene.seconds:g} s")
    print(HEADING)
    for name, claimants in scenes(capacity, scene):
        for seen in play(claimants, scene):
            print(
                f"{name:<22}{seen.sender:<9}{seen.requests:>9}{seen.ttft_p50_s:>9.3f}"
                f"{seen.ttft_p99_s:>9.3f}{seen.tokens_per_s:>10.0f}",
                flush=True,
            )
    return 0


def scenes(capacity: float, scene: Scene) -> list[tuple[str, list[Claimant]]]:
    """Return who sends in each scene."""
    share = capacity / 2.0 / (statistics.fmean(scene.prompts) + scene.output_tokens)
    other = Claimant(name="other", tenant="other", rate=0.8 * share)
    out = [("alone", [other])]
    for name, rate in (("at share", 0.8 * share), ("flood", 10.0 * share)):
        out.append((name, [other, Claimant(name="flooder", tenant="flooder", rate=rate)]))
    offline = Claimant(name="offline", tenant="other", rate=2.0 * share, work_class=OFFLINE)
    for load in (0.7, 0.95):
        online = Claimant(name="online", tenant="other", rate=2.0 * load * share)
        out += [(f"online {load:g}", [online]), (f"{load:g} with offline", [online, offline])]
    return out


def play(claimants: Sequence[Claimant], scene: Scene) -> list[Seen]:
    """Return what each has of a scene, but for its first fifth.

    One whose first token has not come by the end has waited at least until then.
    """
    stage = Stage(claimants, scene)
    stage.run()
    from_s = 0.2 * scene.seconds
    out = []
    for claimant in claimants:
        mine = [trip for trip in stage.trips if trip.by is claimant]
        waits_s = [
            min(trip.ttft_s, scene.seconds - trip.flight.arrived_s)
            for trip in mine
            if trip.flight.arrived_s >= from_s
        ]
        done = [t.flight.job for t in mine if from_s <= t.flight.ended_s < math.inf]
        tokens = sum(job.prompt_tokens + job.output_tokens for job in done)
        out.append(
            Seen(
                sender=claimant.name,
                requests=len(waits_s),
                ttft_p50_s=quantile(waits_s, 0.5) or 0.0,
                ttft_p99_s=quantile(waits_s, 0.99) or 0.0,
                tokens_per_s=tokens / (scene.seconds - from_s),
            )
        )
    return out
