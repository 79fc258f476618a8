"""How much of a pool's need other regions are to start replicas for: soonest first, each once.

The manager of a region alone decides what is started for its own demand. What its law needs beyond
the replicas that serve or come is *short*, in requests in flight. It is given out by when a replica
that is ordered now would serve: this region first, then the others, unless one of them is sooner by
more than `SOONER_S` and `SOONER_SHARE` of our own start. What is given away is not ordered here, so
no request has two replicas started for it.

Only what somebody waits for counts as short. Where nobody does, speed is worth nothing, and
requests stay where they came: replicas above their target take them, and those that another region
had started for them would stand idle (the lab, `loadtest.scaling.regions`, paid a tenth more).

What was given stays given, or the same want would be started for twice: here as soon as the answer
to it begins to show elsewhere. It shrinks as requests begin to be served there (`in_flight` grows)
and where less than that has been short for all of `HOLD_S`, so that chance moves nobody. It is
taken back from a region that offers nothing any more: that is not heard of, or has for
`PATIENCE_S` had nothing that comes, could come or is free.

Residency: no region is given more than the share of the waiting requests that may be computed
there. What others ask of this region is never passed on, as their requests cross one border only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from proxy.contract.demand import Elsewhere

SOONER_S = 0.5  # and no less: a round trip each way, and what all the telling takes
SOONER_SHARE = 0.25  # of our own start
HOLD_S = 10.0
PATIENCE_S = 3.0  # between a replica's order and the summary that tells of it
LEAST = 0.05  # of what a replica carries: not given away for so little


class Here(NamedTuple):
    """This region at one moment."""

    at_s: float
    short: float  # requests in flight that nothing serves or comes for, while somebody waits
    carries: float  # of them, by one replica
    startable: int  # replicas that could be started here
    start_s: float


class Spreading:
    """What one pool has given to other regions, and what tells when it is theirs no more."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._in_flight: dict[str, int] = {}
        self._offered_s: dict[str, float] = {}  # when a region last had something to offer
        self._shorts: deque[tuple[float, float]] = deque()

    def share(self, here: Here, others: Mapping[str, Elsewhere]) -> dict[str, float]:
        """Return the requests in flight that each other region is to have replicas for."""
        if not others and not self._given:
            return {}
        given = self._kept(here, others)
        left = here.short - sum(given.values())
        if left > LEAST * here.carries:
            self._give(here, others, given, left)
        self._given = {region: inputs for region, inputs in given.items() if inputs > 0.0}
        self._in_flight = {region: other.in_flight for region, other in others.items()}
        return dict(self._given)

    # --- what was given -------------------------------------------------------------------------

    def _kept(self, here: Here, others: Mapping[str, Elsewhere]) -> dict[str, float]:
        kept = {}
        for region, inputs in self._given.items():
            other = others.get(region)
            if other is None or not self._offers(region, other, here.at_s):
                continue
            begun = max(0, other.in_flight - self._in_flight.get(region, 0))
            kept[region] = max(0.0, inputs - begun)
        self._offered_s = {region: self._offered_s[region] for region in kept}
        beyond = sum(kept.values()) - self._peak(here)
        for region in sorted(kept, key=lambda r: (-others[r].start_s, r)):
            less = min(kept[region], max(0.0, beyond))
            kept[region] -= less
            beyond -= less
        return kept

    def _offers(self, region: str, other: Elsewhere, at_s: float) -> bool:
        if other.startable or other.coming or other.free:
            self._offered_s[region] = at_s
        return at_s - self._offered_s[region] < PATIENCE_S

    def _peak(self, here: Here) -> float:
        """Return the most that has been short within `HOLD_S`."""
        while self._shorts and self._shorts[0][0] <= here.at_s - HOLD_S:
            self._shorts.popleft()
        while self._shorts and self._shorts[-1][1] <= here.short:
            self._shorts.pop()
        self._shorts.append((here.at_s, here.short))
        return self._shorts[0][1]

    # --- what is new ----------------------------------------------------------------------------

    def _give(
        self, here: Here, others: Mapping[str, Elsewhere], given: dict[str, float], left: float
    ) -> None:
        for region in _order(here, others):
            if left <= LEAST * here.carries:
                return
            if region is None:
                left -= max(0, here.startable) * here.carries
                continue
            other = others[region]
            has, each = given.get(region, 0.0), other.carries or here.carries
            unheard = max(0.0, has - other.coming * each)  # given so lately that it starts it yet
            more = min(left, other.startable * each - unheard, other.share * here.short - has)
            if more > 0.0:
                given[region] = has + more
                self._offered_s[region] = here.at_s
                left -= more


def _order(here: Here, others: Mapping[str, Elsewhere]) -> Iterator[str | None]:
    """Yield who is to start, the soonest first; None: this region."""
    sooner_s = here.start_s - max(SOONER_S, SOONER_SHARE * here.start_s)
    ranked = sorted(
        (other.start_s or math.inf, region) for region, other in others.items() if other.startable
    )
    early = [region for start_s, region in ranked if start_s < sooner_s]
    yield from early
    yield None
    yield from (region for _, region in ranked if region not in early)
