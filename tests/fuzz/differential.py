"""Many seeded mutations of the vectors through our readers and h11.

    python -m tests.fuzz.differential --count 1000000 --seed 1

prints how many octet strings were accepted, refused and incomplete, and every difference found.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

from tests.conformance.differential import Outcome, compare_answers, compare_requests
from tests.conformance.engine_vectors import ENGINE
from tests.conformance.mutate import mutated
from tests.conformance.vectors import REQUESTS

SEED_BYTES_MAX = 600
DIFFERENCES_SHOWN = 20


class Tally:
    """What came of one side's octets."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.counts: Counter[str] = Counter()
        self.exceptions: Counter[str] = Counter()
        self.differing: list[tuple[bytes, str]] = []

    def add(self, octets: bytes, outcome: Outcome) -> None:
        self.counts["messages"] += outcome.taken
        self.exceptions.update(outcome.exceptions)
        if outcome.difference:
            self.counts["different"] += 1
            self.differing.append((octets, outcome.difference))
        elif outcome.refused:
            self.counts["refused"] += 1
        elif outcome.taken:
            self.counts["accepted"] += 1
        else:
            self.counts["incomplete"] += 1

    def report(self) -> None:
        kinds = ("accepted", "refused", "incomplete", "different", "messages")
        shown = "  ".join(f"{kind} {self.counts[kind]}" for kind in kinds)
        print(f"{self.side:8}  {shown}")
        if self.exceptions:
            listed = ", ".join(f"{name} {count}" for name, count in sorted(self.exceptions.items()))
            print(f"{'':8}  listed exceptions met: {listed}")
        for octets, difference in self.differing[:DIFFERENCES_SHOWN]:
            print(f"{'':8}  DIFFERENT {octets!r}\n{'':8}    {difference}")


def compare(count: int, seed: int) -> list[Tally]:
    """Compare `count` octet strings, two of three from clients and one from engines."""
    chance = random.Random(seed)
    sides: list[tuple[Tally, Callable[[bytes], Outcome], Sequence[bytes]]] = [
        (Tally("requests"), compare_requests, [v.octets for v in REQUESTS]),
        (Tally("answers"), compare_answers, [v.octets for v in ENGINE]),
    ]
    for tally, judge, octets in sides:
        seeds = [seed for seed in octets if len(seed) <= SEED_BYTES_MAX]
        # What is refused at once compares nothing: sound ones come thrice as often.
        seeds += 2 * [seed for seed in seeds if judge(seed).taken and not judge(seed).refused]
        share = count - count // 3 if tally.side == "requests" else count // 3
        for _ in range(share):
            mutation = mutated(chance, seeds)
            tally.add(mutation, judge(mutation))
    return [tally for tally, _, _ in sides]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    started_s = time.process_time()
    tallies = compare(args.count, args.seed)
    spent_s = time.process_time() - started_s
    for tally in tallies:
        tally.report()
    different = sum(tally.counts["different"] for tally in tallies)
    print(f"{args.count} strings, seed {args.seed}, {spent_s:.0f} s: {different} differences")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
