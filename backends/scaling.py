"""How many replicas of a pool should serve: the control law, without clock or process.

What is asked for is a *rate*, and a rate does not grow while a replica starts; what has piled up in
front of a pool does. So the law counts replicas by Little's law, arrivals a second x how long a
request stays, over `target_inputs`, and not by what is there at the moment: a pool whose first
replica takes a minute to start is not asked for sixty times too many. What has been ordered is in
`coming_in_s` and counts as there. How long a request stays is measured at loads near the target: by
itself at lower ones, and as `target_inputs` over the throughput of a replica that is full. Before
anything was measured it is taken for the panic window.

Two things lower the number of requests that a replica is taken to carry: a KV cache that would be
fuller than `kv_target`, long before the request count says so, and `target_tokens`.

Up, the largest of these wins:
- *stable*: the mean rate of the stable window;
- *trend*: where the quarters of that window rise steadily, the rate at the time when a start
  that begins now would serve. A step is no trend, and neither is noise;
- *burst*: what the last seconds say with certainty (Poisson arrivals, a lower bound of their rate),
  but only where it is more than all that is there and coming can take at `max_inputs`, or
  `panic_threshold` times the target. Below that it is what the room above the target is for.

Down by one at a time, not in panic (during a burst and two panic windows after it), and only when
the rest stayed under `scaledown_share` of their target for the hold: as long as a start takes, for
which keeping a replica costs what bringing it back would, at most `scaledown_window_s`. To
nothing only when there was nothing for all of `scaledown_window_s`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import msgspec

from backends.load_history import Bucket, LoadHistory

WIDTH_S = 1.0  # of a bucket of the history
ROUND_SHARE = 0.1  # of a replica: not started for so little, the room above the target has it
DEPARTURES_MIN = 20  # that a measured stay rests on
STAY_FORGET_S = 600.0  # time constant with which a stay measured near the target is let go
NEAR_TARGET = (0.6, 1.2)  # load over target at which a measured stay is that at the target
HOLD_STARTS = 1.0  # starts that a replica is held for when it is not needed
CHANCE = 0.5  # deviations that a step of a trend is believed less
PANIC_CALM = 2.0  # panic windows below the threshold until a panic is over


class ScalingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool's configuration says of its size."""

    min: int = 0
    max: int = 1
    buffer: int = 0  # more than demand asks for, while there is any
    target_inputs: float = 1.0  # requests in flight per replica to aim at
    target_tokens: int = 0  # uncached prompt tokens queued per replica to aim at; 0: not looked at
    max_inputs: int = 0  # what a replica can be given at most; 0: any number
    kv_target: float = 0.85  # share of the KV cache held by requests to aim at
    stable_window_s: float = 60.0
    panic_window_s: float = 6.0
    panic_threshold: float = 2.0  # demand of the panic window over what is there
    scaledown_window_s: float = 60.0
    scaledown_share: float = 0.7  # of the target, that the remaining replicas stay under


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment. Counters only grow, over restarts of a proxy too."""

    at_s: float  # monotonic
    in_flight: int = 0
    queued: int = 0
    queued_tokens: int = 0  # uncached prompt tokens that wait in proxies
    in_flight_tokens: int = 0  # uncached prompt tokens that wait on replicas
    arrivals_total: int = 0
    refused_total: int = 0
    kv_used_ratio: float = 0.0  # mean over the replicas that serve
    preemptions_total: int = 0
    ready: int = 0  # replicas that serve
    coming_in_s: tuple[float, ...] = ()  # for each on its way up: seconds until it should serve
    start_s: float = 0.0  # what bringing up one more would take
    gpu_limit: int | None = None  # replicas that the GPU budget allows; None: not limited


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What should be, and why: `terms` has every figure that entered, by its name."""

    desired: int
    panicking: bool = False
    reason: str = ""
    terms: dict[str, float] = {}


class Scaler:
    """The law for one pool. It remembers a bounded history and nothing else; `policy` may be
    replaced at any time."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self._history = LoadHistory(WIDTH_S, _span_s(policy))
        self._last: Observation | None = None
        self._stay_s: float | None = None  # of a request on a replica at its target
        self._full_since_s: float | None = None  # since when replicas have all they aim at
        self._burst_since_s: float | None = None
        self._panic_until_s = -math.inf

    def decide(self, seen: Observation) -> Decision:
        """Return what should be, given what is. `seen.at_s` never goes back."""
        self._record(seen)
        self._measure(seen)
        policy = self.policy
        total = seen.ready + len(seen.coming_in_s)
        terms = {"ready": float(seen.ready), "coming": float(len(seen.coming_in_s))}
        wants = self._wants(seen, terms)
        burst = self._burst(seen, total, terms)
        panicking = seen.at_s < self._panic_until_s
        need, name = max((value, name) for name, value in {**wants, "burst": burst}.items())
        terms["need"] = need
        up = math.ceil(need - ROUND_SHARE)
        if seen.in_flight + seen.queued > 0:
            up = max(up, 1)
        if self._active(seen):
            up += policy.buffer
        if up >= total:
            desired = up
            reason = f"{name} asks for {need:.1f}" if up > total else f"{need:.1f} are needed"
        else:
            desired, reason = self._lower(seen, total, panicking, terms)
            desired = max(desired, up)
        clamped = self._clamped(desired, seen)
        if clamped != desired:
            reason += f"; {desired} limited to {clamped}"
        terms["desired"] = float(clamped)
        return Decision(desired=clamped, panicking=panicking, reason=reason, terms=terms)

    # --- what has been --------------------------------------------------------------------------

    def _record(self, seen: Observation) -> None:
        self._history.keep(_span_s(self.policy))
        last, self._last = self._last, seen
        bucket = self._history.bucket(seen.at_s)
        if last is None:
            return
        span_s = max(0.0, seen.at_s - last.at_s)
        bucket.span_s += span_s
        bucket.flight_s += span_s * seen.in_flight
        bucket.stock_s += span_s * (seen.in_flight + seen.queued)
        bucket.ready_s += span_s * seen.ready
        bucket.tokens_s += span_s * (seen.queued_tokens + seen.in_flight_tokens)
        preemptions = max(0, seen.preemptions_total - last.preemptions_total)
        bucket.kv_s += span_s * seen.ready * (1.0 if preemptions else seen.kv_used_ratio)
        bucket.preemptions += preemptions
        arrivals = max(0, seen.arrivals_total - last.arrivals_total)
        refused = max(0, seen.refused_total - last.refused_total)
        stock = seen.in_flight + seen.queued
        gone = max(0, arrivals - refused - stock + last.in_flight + last.queued)
        bucket.arrivals += arrivals
        bucket.departures += gone
        bucket.admitted += max(0, gone + seen.in_flight - last.in_flight)

    def _measure(self, seen: Observation) -> None:
        """Learn how long a request stays on a replica that has as many as it should."""
        target = self.policy.target_inputs
        full = seen.ready > 0 and seen.in_flight >= target * seen.ready
        if not full:
            self._full_since_s = None
        elif self._full_since_s is None:
            self._full_since_s = seen.at_s
        window = self._history.summed(seen.at_s - self.policy.stable_window_s)
        if window.departures < DEPARTURES_MIN or not window.ready_s or not window.flight_s:
            return
        stay_s = window.flight_s / ((window.departures + window.admitted) / 2)
        load = window.flight_s / window.ready_s / target
        if self._stay_s is None or NEAR_TARGET[0] <= load <= NEAR_TARGET[1]:
            self._stay_s = stay_s
        elif load < NEAR_TARGET[0]:
            slow_s = (stay_s - self._stay_s) * WIDTH_S / STAY_FORGET_S
            self._stay_s = max(stay_s, self._stay_s + slow_s)
        else:
            self._stay_s = max(self._stay_s, self._stay_when_full(seen, self._stay_s))

    def _stay_when_full(self, seen: Observation, stay_s: float) -> float:
        """Return the least stay at the target that the throughput of full replicas allows."""
        if self._full_since_s is None:
            return 0.0
        since_s = max(self._full_since_s + stay_s, seen.at_s - self.policy.stable_window_s)
        window = self._history.summed(since_s)
        if window.departures < DEPARTURES_MIN:
            return 0.0
        certain = window.departures + math.sqrt(window.departures)
        return self.policy.target_inputs * window.ready_s / certain

    # --- what is needed -------------------------------------------------------------------------

    def _carried(self, window: Bucket) -> float:
        """Return how many requests a replica is taken to carry: fewer where their KV is large."""
        target = self.policy.target_inputs
        if window.kv_s > 0.0 and window.flight_s > 0.0:
            target = min(target, self.policy.kv_target * window.flight_s / window.kv_s)
        return max(target, 1e-3)

    def _inputs(self, seen: Observation, rate: float) -> float:
        """Return the requests in flight that arrivals at `rate` come to."""
        now = seen.in_flight + seen.queued
        if self._stay_s is None:
            return min(now, rate * self.policy.panic_window_s)
        panic = self._history.summed(seen.at_s - self.policy.panic_window_s)
        ahead_s = max(seen.start_s, self.policy.panic_window_s)
        return min(rate * self._stay_s, now + _rate(panic) * ahead_s)

    def _wants(self, seen: Observation, terms: dict[str, float]) -> dict[str, float]:
        """Return what each of the slow signals asks for, in replicas."""
        policy = self.policy
        window = self._history.summed(seen.at_s - policy.stable_window_s)
        carried = self._carried(window)
        rate = _rate(window)
        terms["arrivals_per_s"] = rate
        terms["stay_s"] = self._stay_s or 0.0
        terms["carried"] = carried
        wants = {"stable": self._inputs(seen, rate) / carried}
        rise = self._rise(seen.at_s)
        if rise > 0.0:
            ahead_s = seen.start_s + policy.stable_window_s / 2
            wants["trend"] = self._inputs(seen, rate + rise * ahead_s) / carried
        if policy.target_tokens and window.span_s:
            wants["tokens"] = self._tokens(seen, window)
        if window.kv_s and window.span_s:
            wants["kv"] = window.kv_s / window.span_s / policy.kv_target
        terms.update(wants)
        return wants

    def _tokens(self, seen: Observation, window: Bucket) -> float:
        """Return the replicas that waiting prompts ask for: those that came within a panic window.
        Older ones wait for what has been ordered for them."""
        stock = seen.in_flight + seen.queued
        panic = self._history.summed(seen.at_s - self.policy.panic_window_s)
        recent = min(1.0, panic.arrivals / stock) if stock else 0.0
        tokens = recent * panic.tokens_s / panic.span_s if panic.span_s else 0.0
        return min(tokens, window.tokens_s / window.span_s) / self.policy.target_tokens

    def _rise(self, at_s: float) -> float:
        """Return by how much the rate grows a second: what each step between the quarters of the
        stable window shows beyond chance. A sudden one shows in two of the three at most."""
        quarter_s = self.policy.stable_window_s / 4
        ends = [at_s - k * quarter_s for k in (3, 2, 1, 0)]
        quarters = [self._history.summed(end_s - quarter_s, end_s) for end_s in ends]
        if any(quarter.span_s < 0.8 * quarter_s for quarter in quarters):
            return 0.0
        steps = [
            _rate(after) - _rate(before) - CHANCE * math.hypot(_chance(before), _chance(after))
            for before, after in itertools.pairwise(quarters)
        ]
        return max(0.0, min(steps)) / quarter_s

    def _burst(self, seen: Observation, total: int, terms: dict[str, float]) -> float:
        """Return what the last seconds ask for; 0 where the room above the target has it."""
        policy = self.policy
        room = policy.panic_threshold
        if policy.max_inputs:
            room = min(room, policy.max_inputs / policy.target_inputs)
        limit = max(1, total) * room
        panic = self._history.summed(seen.at_s - policy.panic_window_s)
        carried = self._carried(panic)
        sure = max(self._bounds(seen, 2.0), default=0.0)
        sure_replicas = self._inputs(seen, sure) / carried
        terms["burst_floor"] = sure_replicas
        terms["burst_limit"] = limit
        began = sure_replicas > limit
        if began:
            self._panic_until_s = seen.at_s + PANIC_CALM * policy.panic_window_s
            if self._burst_since_s is None:
                self._burst_since_s = seen.at_s - policy.panic_window_s / 2
        elif seen.at_s >= self._panic_until_s:
            self._burst_since_s = None
        if self._burst_since_s is None:
            return 0.0
        likely = max(self._bounds(seen, 1.0), default=0.0)
        return self._inputs(seen, likely) / carried

    def _bounds(self, seen: Observation, deviations: float) -> Iterator[float]:
        """Yield lower bounds of the rate of arrivals, over the panic window and parts of it."""
        spans = [self.policy.panic_window_s / part for part in (1, 2, 3)]
        if self._burst_since_s is not None:
            since_s = seen.at_s - self._burst_since_s
            spans.append(min(since_s, self.policy.stable_window_s))
        for span_s in spans:
            window = self._history.summed(seen.at_s - span_s)
            if window.span_s > 0.0:
                less = deviations * math.sqrt(window.arrivals)
                yield max(0.0, window.arrivals - less) / window.span_s

    def _active(self, seen: Observation) -> bool:
        window = self._history.summed(seen.at_s - self.policy.scaledown_window_s)
        return window.stock_s > 0.0 or window.arrivals > 0 or seen.in_flight + seen.queued > 0

    # --- down, and the bounds -------------------------------------------------------------------

    def _lower(
        self, seen: Observation, total: int, panicking: bool, terms: dict[str, float]
    ) -> tuple[int, str]:
        policy = self.policy
        if panicking:
            return total, "in panic nothing is taken away"
        hold_s = min(
            policy.scaledown_window_s,
            max(2 * policy.panic_window_s, HOLD_STARTS * seen.start_s),
        )
        terms["hold_s"] = hold_s
        if total == 1:
            if self._active(seen):
                return 1, "the last one is kept while there is work"
            return 0, f"nothing came for {policy.scaledown_window_s:g} s"
        window = self._history.summed(seen.at_s - hold_s)
        carried = self._carried(window)
        held = self._inputs(seen, _rate(window)) / carried
        held = max(held, seen.in_flight / carried)
        terms["held"] = held
        if window.span_s < 0.8 * hold_s or held > policy.scaledown_share * (total - 1):
            return total, f"{held:.1f} of {total - 1} would be too many to take one away"
        return total - 1, f"{total - 1} would have {held:.1f}"

    def _clamped(self, desired: int, seen: Observation) -> int:
        policy = self.policy
        limit = policy.max if seen.gpu_limit is None else min(policy.max, seen.gpu_limit)
        return min(max(desired, policy.min), limit)


def _span_s(policy: ScalingPolicy) -> float:
    return max(policy.stable_window_s, policy.scaledown_window_s, policy.panic_window_s)


def _rate(window: Bucket) -> float:
    return window.arrivals / window.span_s if window.span_s else 0.0


def _chance(window: Bucket) -> float:
    """Return one deviation of the rate, if arrivals are Poisson."""
    return math.sqrt(window.arrivals) / window.span_s if window.span_s else 0.0
