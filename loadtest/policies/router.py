"""What a rival's router may know, and how the lab drives it: its own counts, its own cache model.

Rivals are written down here as rules, not as products: the published rule as it reads, on the same
replicas. Each of several proxies has a router of its own; when they share, they are one. Rules that
read events of the engines' caches read the truth with no delay, which flatters them.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import override

from loadtest.policies.caches import Caches
from loadtest.policies.engines import SLOT_WAIT_S, Flight
from loadtest.policies.workload import BLOCK_TOKENS, Job
from loadtest.policies.world import Chooser, Stage

RING_POINTS = 128
_MASK = (1 << 64) - 1

Rule = Callable[["Router", Flight], int]


def mix(value: int) -> int:
    """Return 64 well mixed bits (splitmix64, public domain, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Router:
    """One proxy's own picture: load that it placed, blocks that it sent."""

    def __init__(self, stage: Stage, believed: float) -> None:
        fleet = stage.fleet
        count = fleet.replicas
        self.stage = stage
        self.rate = fleet.timing.prefill_tokens_per_s
        self.slots = fleet.slots
        self.live: list[int] = list(range(count))
        self.requests = [0] * count  # under way
        self.tokens = [0] * count  # of prefill, whose first token was not seen
        self.blocks = [0] * count  # of requests under way
        self.wear = [0] * count  # tokens ever sent to be computed
        self.believed = Caches(count, int(fleet.capacity_tokens // BLOCK_TOKENS * believed))
        self.unanswered: list[deque[Flight]] = [deque() for _ in range(count)]
        self.answered_s = [0.0] * count  # since when the oldest of those is being worked on
        self.turn = 0  # of round robin
        self.seen_depth = -1  # blocks that the chosen replica truly has, where a rule knows
        self.window: deque[tuple[float, int, float]] = deque()
        self.window_s = [0.0] * count
        self.chance = random.Random(stage.drive.seed)
        self._all_points = sorted(
            (mix(mix(replica) ^ point), replica)
            for replica in range(count)
            for point in range(RING_POINTS)
        )
        self.set_live(count)

    def set_live(self, count: int) -> None:
        self.live = list(range(count))
        placed = [pair for pair in self._all_points if pair[1] < count]
        self._points = [point for point, _ in placed]
        self._owners = [replica for _, replica in placed]

    # --- what rules ask -----------------------------------------------------------------------

    def walk(self, key: int) -> Iterator[int]:
        """Yield the live replicas in ring order from a key."""
        owners = self._owners
        begin = bisect_left(self._points, mix(key * 2654435761 + 12345))
        seen = 0
        for step in range(len(owners)):
            replica = owners[(begin + step) % len(owners)]
            if not seen >> replica & 1:
                seen |= 1 << replica
                yield replica

    def lightest(self, load: Sequence[float], among: Sequence[int] | None = None) -> int:
        """Return a replica of least load, by chance among equals."""
        chosen, ties = -1, 0
        for replica in self.live if among is None else among:
            if chosen < 0 or load[replica] < load[chosen]:
                chosen, ties = replica, 1
            elif load[replica] == load[chosen]:
                ties += 1
                if self.chance.random() * ties < 1:
                    chosen = replica
        return chosen

    def credit(self, replica: int) -> float:
        """Return tokens of the oldest unanswered request that must be done by now."""
        unanswered = self.unanswered[replica]
        if not unanswered:
            return 0.0
        elapsed_s = self.stage.now_s - self.answered_s[replica]
        return min(unanswered[0].estimate_tokens, elapsed_s * self.rate)

    def slot_wait_s(self, replica: int) -> float:
        over = self.requests[replica] + 1 - self.slots
        return over * SLOT_WAIT_S if over > 0 else 0.0

    # --- what it learns -----------------------------------------------------------------------

    def sent(self, flight: Flight, now_s: float) -> None:
        replica, job = flight.replica, flight.job
        depth = self.believed.depth(replica, job.blocks)
        if self.seen_depth >= 0:
            depth, self.seen_depth = self.seen_depth, -1
        flight.estimate_tokens = uncached(job, depth)
        self.believed.insert(replica, job.blocks)
        self.wear[replica] += flight.estimate_tokens
        if not self.unanswered[replica]:
            self.answered_s[replica] = now_s
        self.unanswered[replica].append(flight)
        self.tokens[replica] += flight.estimate_tokens
        self.blocks[replica] += len(job.blocks)
        self.requests[replica] += 1

    def first_token(self, flight: Flight, now_s: float) -> None:
        self.tokens[flight.replica] -= flight.estimate_tokens
        self.unanswered[flight.replica].remove(flight)
        self.answered_s[flight.replica] = now_s

    def ended(self, flight: Flight) -> None:
        self.requests[flight.replica] -= 1
        self.blocks[flight.replica] -= len(flight.job.blocks)


def uncached(job: Job, depth: int) -> int:
    """Return the tokens to compute of a prompt of which so many blocks are cached."""
    return max(1, job.prompt_tokens - depth * BLOCK_TOKENS)


class Rival(Chooser):
    """A rule, with a router a proxy; or with one for all, where they share."""

    def __init__(self, stage: Stage, rule: Rule, *, shared: bool, believed: float = 1.0) -> None:
        count = 1 if shared else stage.drive.proxies
        self._routers = [Router(stage, believed) for _ in range(count)]
        self._rule = rule

    def _router(self, flight: Flight) -> Router:
        return self._routers[flight.proxy % len(self._routers)]

    @override
    def choose(self, flight: Flight, now_s: float) -> int:
        return self._rule(self._router(flight), flight)

    @override
    def sent(self, flight: Flight, now_s: float) -> None:
        self._router(flight).sent(flight, now_s)

    @override
    def first_token(self, flight: Flight, now_s: float) -> None:
        self._router(flight).first_token(flight, now_s)

    @override
    def ended(self, flight: Flight, now_s: float) -> None:
        self._router(flight).ended(flight)

    @override
    def alive(self, count: int, now_s: float) -> None:
        for router in self._routers:
            router.set_live(count)
