"""Regions in virtual time: pools that are apart, requests that cross, and what managers ask.

A region tells the others several times a second what it could begin at once; what it says is half a
round trip old when it is heard, and what was sent there since is counted by whoever sent it. Its
manager looks once a second, as in the other cells of this lab; what it asks of others they know
half a second later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from typing_extensions import override

from backends.observation import Observation
from backends.scaling import Scaler
from loadtest.scaling.replicas import Job, Speeds
from loadtest.scaling.world import QUEUED_MAX, Pool, Seen, World
from proxy.contract.demand import Elsewhere

SUMMARY_S = 0.25  # between two summaries
ASKED_S = 0.5  # until another manager knows what is asked of it
TICK_S = 1.0
SLACK_S = 0.02  # by which another region must be sooner than the round trip makes up for
ENDS = 20  # of which the pace follows, in which requests end


class Traveller(Job):
    """A request, where it came, and what its going elsewhere has cost, both ways."""

    __slots__ = ("home", "round_trip_s")

    def __init__(self, job: Job, home: str) -> None:
        super().__init__(job.at_s, job.prompt_tokens, job.output_tokens)
        self.home = home
        self.round_trip_s = 0.0


class Summary(NamedTuple):
    """What a region has said of itself."""

    at_s: float
    free: int
    wait_s: float
    queued: int


class Region(Pool):
    """One region's pool; its queue is that of its own clients and of who came over."""

    def __init__(self, land: Land, name: str, *, start_s: float, max_inputs: int) -> None:
        super().__init__(land.world, start_s=start_s, max_inputs=max_inputs, speeds=Speeds())
        self.name = name
        self.land = land
        self.heard: dict[str, Summary] = {}
        self.sent: dict[str, list[float]] = {}  # when, what no summary shows yet
        self.there: dict[str, int] = {}  # of ours in other regions
        self.moved_total = 0
        self._ends_s: deque[float] = deque(maxlen=ENDS)

    @override
    def arrive(self, job: Job, now_s: float) -> None:
        self.arrivals_total += 1
        if not self.queue and self._moves(job, now_s):
            return
        if len(self.queue) >= QUEUED_MAX:
            self.refused_total += 1
            return
        self.queue.append(job)
        self.queued_tokens += job.prompt_tokens
        self.serve(now_s)

    @override
    def serve(self, now_s: float) -> None:
        super().serve(now_s)
        while self.queue and self._moves(self.queue[0], now_s):
            self.queued_tokens -= self.queue.popleft().prompt_tokens

    @override
    def ended(self, job: Job, now_s: float) -> None:
        self._ends_s.append(now_s)
        if isinstance(job, Traveller) and job.home != self.name:
            self.land.regions[job.home].there[self.name] -= 1

    def _moves(self, job: Job, now_s: float) -> bool:
        """Send a request to a region that begins it sooner, if one does."""
        if not self.land.moves or not isinstance(job, Traveller) or job.home != self.name:
            return False  # one hop
        best_s, best = min(
            (self._price_s(name, now_s), name) for name in self.land.regions if name != self.name
        )
        if best_s >= self._home_s(now_s):
            return False
        self.moved_total += 1
        self.sent.setdefault(best, []).append(now_s)
        self.there[best] = self.there.get(best, 0) + 1
        job.round_trip_s = self.land.round_trip_s(self.name, best)
        region = self.land.regions[best]
        self.world.at(now_s + job.round_trip_s / 2, lambda at_s: region.arrive(job, at_s))
        return True

    def _price_s(self, name: str, now_s: float) -> float:
        """Return what a request would wait for there, the way included; infinite: not begun."""
        said = self.heard.get(name)
        if said is None or said.queued or said.free <= len(self.sent.get(name, ())):
            return math.inf
        return said.wait_s + self.land.round_trip_s(self.name, name) + SLACK_S

    def _home_s(self, now_s: float) -> float:
        """Return how long one more would wait here: for prompts before it, or, where all are full,
        until one for each that waits has ended, or one that comes is there."""
        said = self.summary(now_s)
        if said.free and not self.queue:
            return said.wait_s
        comes_s = self.coming[0] - now_s if self.coming else math.inf
        if not self._ends_s or now_s <= self._ends_s[0]:
            return comes_s
        per_s = len(self._ends_s) / (now_s - self._ends_s[0])
        return min((len(self.queue) + 1) / per_s, comes_s)

    def summary(self, now_s: float) -> Summary:
        free = sum(max(0, self.max_inputs - one.in_flight) for one in self.ready)
        able = [one for one in self.ready if one.in_flight < self.max_inputs]
        tokens = min((one.waiting_tokens for one in able), default=0)
        return Summary(now_s, free, tokens * self.speeds.prefill_s_per_token, len(self.queue))

    def hear(self, name: str, said: Summary) -> None:
        """Take what another region has said, and forget what it shows by now."""
        self.heard[name] = said
        shown_s = said.at_s - self.land.round_trip_s(self.name, name) / 2
        self.sent[name] = [at_s for at_s in self.sent.get(name, ()) if at_s > shown_s]


class Land:
    """All regions, and how far they are from each other."""

    def __init__(
        self, world: World, round_trip_s: Callable[[str, str], float], *, moves: bool
    ) -> None:
        self.world = world
        self.round_trip_s = round_trip_s
        self.moves = moves
        self.regions: dict[str, Region] = {}
        self.limits: dict[str, int] = {}
        self.carries: dict[str, float] = {}

    def add(self, region: Region, most: int, carries: float) -> None:
        self.regions[region.name] = region
        self.limits[region.name] = most
        self.carries[region.name] = carries

    def tell(self, until_s: float) -> None:
        """Have every region tell the others of itself, again and again."""

        def say(now_s: float) -> None:
            for name, region in self.regions.items():
                said = region.summary(now_s)
                for other in self.regions.values():
                    if other is not region:
                        self._carry(name, other, said, now_s)
            if now_s < until_s:
                self.world.at(now_s + SUMMARY_S, say)

        self.world.at(0.0, say)

    def _carry(self, name: str, other: Region, said: Summary, now_s: float) -> None:
        def hear(at_s: float) -> None:
            other.hear(name, said)
            other.serve(at_s)

        self.world.at(now_s + self.round_trip_s(name, other.name) / 2, hear)


class DemandBetween:
    """The managers: each decides for its region, and may leave others a part of what it needs."""

    def __init__(self, land: Land, scalers: Mapping[str, Scaler], *, shares: bool) -> None:
        self.peak = 0
        self.asked_s = 0.0  # replica-seconds
        self._land = land
        self._scalers = scalers
        self._shares = shares
        self._asked: dict[str, dict[str, float]] = {name: {} for name in land.regions}  # by asker
        self._known: dict[str, dict[str, float]] = {name: {} for name in land.regions}  # by asked
        self._arrivals: dict[str, int] = dict.fromkeys(land.regions, 0)

    def govern(self, until_s: float) -> None:
        for number, name in enumerate(self._land.regions):
            self._tick_regularly(name, TICK_S * (1 + number / len(self._land.regions)), until_s)

    def _tick_regularly(self, name: str, first_s: float, until_s: float) -> None:
        def tick(now_s: float) -> None:
            self._decide(name, now_s)
            if now_s < until_s:
                self._land.world.at(now_s + TICK_S, tick)

        self._land.world.at(first_s, tick)

    def _decide(self, name: str, now_s: float) -> None:
        region = self._land.regions[name]
        region.serve(now_s)
        decision = self._scalers[name].decide(self._observation(region, now_s))
        region.resize(decision.desired, now_s)
        self.peak = max(self.peak, sum(one.size for one in self._land.regions.values()))
        self.asked_s += TICK_S * sum(decision.away.values()) / self._land.carries[name]
        for other in self._land.regions:
            if other != name:
                self._ask(name, other, float(math.ceil(decision.away.get(other, 0.0))), now_s)

    def _ask(self, name: str, other: str, inputs: float, now_s: float) -> None:
        if self._known[other].get(name, 0.0) == inputs:
            return
        self._land.world.at(now_s + ASKED_S, lambda _: self._known[other].update({name: inputs}))

    def _observation(self, region: Region, now_s: float) -> Observation:
        seen = Seen(now_s, region)
        # What has left is another region's; a counter never falls.
        net = seen.arrivals_total - region.moved_total
        self._arrivals[region.name] = max(self._arrivals[region.name], net)
        return Observation(
            at_s=seen.at_s,
            in_flight=seen.in_flight,
            queued=seen.queued,
            queued_tokens=seen.queued_tokens,
            in_flight_tokens=seen.in_flight_tokens,
            arrivals_total=self._arrivals[region.name],
            refused_total=seen.refused_total,
            kv_used_ratio=seen.kv_used_ratio,
            ready=seen.ready,
            coming_in_s=seen.coming_in_s,
            start_s=seen.start_s,
            wanted=sum(self._known[region.name].values()),
            elsewhere=self._elsewhere(region) if self._shares else {},
        )

    def _elsewhere(self, region: Region) -> dict[str, Elsewhere]:
        land = self._land
        return {
            name: Elsewhere(
                start_s=other.start_s + land.round_trip_s(region.name, name),
                startable=max(0, land.limits[name] - other.size),
                coming=len(other.coming),
                free=other.summary(0.0).free,
                in_flight=region.there.get(name, 0),
                carries=land.carries[name],
            )
            for name, other in land.regions.items()
            if other is not region
        }
