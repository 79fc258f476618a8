"""How many replicas of a pool should serve: the control law, without clock or process.

What is asked for is a *rate*, and a rate does not grow while a replica starts; what has piled up in
front of a pool does. So the law counts replicas by Little's law (Operations Research 9 (3), 1961),
arrivals a second x how long a request stays over `target_inputs`, and not by what is there at the
moment: a pool whose first replica takes a minute to start is not asked for sixty times too many.
What has been ordered is in `coming_in_s` and counts as there. How long a request stays depends on
how many stay with it: it is measured at loads at or below the target, and on full replicas by what
they get done, and lies between. Until anything was measured it is taken for the panic window.

A KV cache that would be fuller than `kv_target` lowers the requests that a replica is taken to
carry: what one request holds is measured while the caches are not full, because afterwards requests
that wait inside the engine are in flight as well.

Up, the largest of these wins:
- *stable*: the mean rate of the stable window, or what the last seconds show at most if that is
  less: what is over is not asked for;
- *recent*: that of the last half or quarter of it, less what chance may have added;
- *inputs*: the mean in flight, where nothing waited: however long it stays, it was asked for;
- *trend*: where the history, or what came since a step in it, is a line beyond chance, the rate
  when a start that begins now would serve (`backends.load_trend`);
- *burst*: what the last seconds say with certainty (Poisson arrivals, a lower bound of their rate),
  but only where it is more than all that is there and coming can take at `max_inputs`, or
  `panic_threshold` times the target. Below that it is what the room above the target is for. While
  requests wait, a share more is ordered to work them off;
- *queue*: one more than there is, where requests have waited for some seconds, none is coming, and
  their number does not fall: what works off a queue already needs time, not replicas;
- *tokens* that came within the panic window, and *kv*.

Down by one at a time, not in panic (during a burst, until the stable window has it or it is over),
not while requests wait for what is coming, and only when the rest stayed under `scaledown_share` of
their target for the hold: as long as a start takes, for which keeping a replica costs what bringing
it back would, at most `scaledown_window_s`. To nothing only when there was nothing for all of
`scaledown_window_s`.

Of what nothing serves or comes for, other regions may be left a part (`spread`); what they ask of
this one is needed as well.

No seasonal baseline: the lab (`loadtest.scaling`) has a day's wave followed without one, for a few
hundredths more than an oracle's replica-seconds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from backends.load_history import LoadHistory, Totals
from backends.load_trend import PARTS, rate_ahead
from backends.observation import Decision, Observation, ScalingPolicy
from backends.spread import Here, Spreading

WIDTH_S = 1.0  # of a bucket of the history
ROUND_SHARE = 0.05  # of a replica: not started for so little, the room above the target has it
PASSED_MIN = 20  # that a measured stay rests on
FIRST_PASSED_MIN = 8  # the first one: better than none
FULL_SURE = 1.0  # deviations that the throughput of full replicas is believed more
KV_FULL = 0.95  # of its cache: a replica that holds more has requests that wait inside
MIN_CARRIED = 1e-3
BACKLOG_SHARE = 0.15  # of a burst's replicas: how many more may work off what has piled up
STAY_FORGET_S = 600.0  # time constant with which a stay measured near the target is let go
NEAR_TARGET = (0.6, 1.2)  # load over target at which a measured stay is that at the target
HOLD_MIN_SHARE = 0.3  # of the stable window: what chance needs to be told from less
HOLD_STARTS = 1.0  # starts that a replica is held for when it is not needed
RECENT_SURE = 1.5  # deviations that the mean of less than the stable window is believed less
DRAINS_SURE = (
    1.0  # deviations of what comes and goes, by which a queue must shrink to count as going
)
QUEUE_PANICS = 0.7  # panic windows that a queue must have stood for, to be worth one more replica
SURE = 3.0  # deviations below what came, that a burst must be over the limit with
SURE_QUEUED = 2.0  # the same where requests wait already: chance alone does not fill every replica
LIKELY = 0.5  # and that it is answered with
BURST_OVER = 0.75  # of its mean rate: where it falls below, the burst is over


class Stay(NamedTuple):
    """How long a request stayed while a replica had so many."""

    inputs: float
    stay_s: float


class Scaler:
    """The law for one pool. It remembers a bounded history and nothing else; `policy` may be
    replaced at any time."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self._history = LoadHistory(WIDTH_S, _span_s(policy))
        self._last: Observation | None = None
        self._carried = policy.target_inputs  # requests that a replica should have
        self._calm: Stay | None = None
        self._full: Stay | None = None  # the last that was at the target or above it
        self._full_since_s: float | None = None  # since when replicas have all they aim at
        self._full_ready = 0
        self._queued_for_s = 0.0
        self._burst_since_s: float | None = None
        self._spreading = Spreading()

    def decide(self, seen: Observation) -> Decision:
        """Return what should be, given what is. `seen.at_s` never goes back."""
        self._record(seen)
        self._measure(seen)
        policy = self.policy
        total = seen.ready + len(seen.coming_in_s)
        terms = {"ready": float(seen.ready), "coming": float(len(seen.coming_in_s))}
        trend = self._trend(seen)
        wants = self._wants(seen, trend, terms)
        burst = self._burst(seen, total, terms)
        panicking = self._burst_since_s is not None
        need, name = max((value, name) for name, value in {**wants, "burst": burst}.items())
        terms["need"] = need
        asked = seen.in_flight + seen.queued
        need, away = self._shared(seen, total, max(need, min(1.0, asked / self._carried)), terms)
        up = math.ceil(need - ROUND_SHARE)
        if asked + seen.wanted > sum(away.values()):
            up = max(up, 1)
        if self._active(seen):
            up += policy.buffer
        if up >= total:
            desired = up
            reason = f"{need:.1f} are needed"
            if up > total:
                reason = self._more(seen, total, need, name)
        else:
            desired, reason = self._lower(seen, total, trend, terms)
            desired = max(desired, up)
        clamped = self._clamped(desired, seen)
        if clamped != desired:
            by = " by the GPUs there are" if clamped == seen.gpu_limit else ""
            reason += f"; {desired} limited to {clamped}{by}"
        if away:
            reason += f"; {terms['away']:.1f} left to {', '.join(sorted(away))}"
        if seen.wanted:
            reason += f"; {terms['wanted']:.1f} of it for other regions"
        terms["desired"] = float(clamped)
        return Decision(desired=clamped, panicking=panicking, reason=reason, terms=terms, away=away)

    # --- what has been --------------------------------------------------------------------------

    def _record(self, seen: Observation) -> None:
        self._history.keep(_span_s(self.policy, seen.start_s))
        last, self._last = self._last or seen, seen
        span_s = max(0.0, seen.at_s - last.at_s)
        self._queued_for_s = self._queued_for_s + span_s if seen.queued and last.queued else 0.0
        arrivals = max(0, seen.arrivals_total - last.arrivals_total)
        refused = max(0, seen.refused_total - last.refused_total)
        rise = seen.in_flight - last.in_flight
        departures = max(0, arrivals - refused - rise - seen.queued + last.queued)
        preempted = seen.preemptions_total > last.preemptions_total
        kv_ratio = 1.0 if preempted else seen.kv_used_ratio
        calm = seen.in_flight <= NEAR_TARGET[1] * self._carried * seen.ready
        calm &= kv_ratio < KV_FULL
        self._history.add(
            Totals(
                at_s=seen.at_s,
                span_s=span_s,
                stock_s=span_s * (seen.in_flight + seen.queued),
                flight_s=span_s * seen.in_flight,
                ready_s=span_s * seen.ready,
                kv_s=span_s * seen.ready * kv_ratio,
                tokens_s=span_s * (seen.queued_tokens + seen.in_flight_tokens),
                arrivals=arrivals,
                departures=departures,
                calm_flight_s=calm * span_s * seen.in_flight,
                calm_ready_s=calm * span_s * seen.ready,
                calm_kv_s=calm * span_s * seen.ready * kv_ratio,
                calm_passed=calm * max(0.0, departures + rise / 2),
            )
        )

    def _measure(self, seen: Observation) -> None:
        """Learn how long a request stays beside few others, and beside as many as there should be
        or more."""
        target = self._carried
        if seen.ready == 0 or seen.in_flight < target * seen.ready:
            self._full_since_s = None
        elif self._full_since_s is None or seen.ready > self._full_ready:
            self._full_since_s = seen.at_s  # what begins on a new one ends a stay later
        self._full_ready = seen.ready
        if self._full_since_s is not None:
            self._measure_full(seen, self._full_since_s)
        window = self._history.window(seen.at_s - self.policy.stable_window_s)
        known = FIRST_PASSED_MIN if self._calm is None else PASSED_MIN
        if window.calm_passed < known or not window.calm_flight_s:
            return
        self._carried = self.policy.target_inputs
        if window.calm_kv_s > 0.0:  # a request's part of a cache says how many fill it
            kv_inputs = self.policy.kv_target * window.calm_flight_s / window.calm_kv_s
            self._carried = max(MIN_CARRIED, min(self._carried, kv_inputs))
        inputs = window.calm_flight_s / window.calm_ready_s
        self._calm = Stay(inputs, window.calm_flight_s / window.calm_passed)
        if inputs >= NEAR_TARGET[0] * target:
            self._full = self._calm
        elif self._full is not None:
            forgotten = min(1.0, WIDTH_S / STAY_FORGET_S)
            stay_s = self._full.stay_s + (self._calm.stay_s - self._full.stay_s) * forgotten
            self._full = Stay(self._full.inputs, stay_s)

    def _measure_full(self, seen: Observation, full_since_s: float) -> None:
        """Learn from replicas that are full what is certain: a stay by what they get done."""
        stay_s = self._stay_s() or self.policy.panic_window_s
        since_s = max(full_since_s + stay_s, seen.at_s - self.policy.stable_window_s)
        window = self._history.window(since_s)
        if window.departures < PASSED_MIN or window.span_s < stay_s or not window.ready_s:
            return
        certain = window.departures + FULL_SURE * math.sqrt(window.departures)
        found = Stay(window.flight_s / window.ready_s, window.flight_s / certain)
        if self._full is None or found.stay_s > self._full.stay_s:
            self._full = found

    def _stay_s(self) -> float | None:
        """Return how long a request stays on a replica that has what it should have; None if
        nothing was measured. Between few and many it grows by the same with each one more."""
        few, many, target = self._calm, self._full, self._carried
        if many is None:
            return few.stay_s if few else None
        if few is None:  # the throughput of one that is full is at least that of one at its target
            few = Stay(0.0, many.stay_s * min(1.0, target / many.inputs))
        if few.inputs >= NEAR_TARGET[0] * target or many.inputs <= few.inputs:
            return few.stay_s
        slope = (many.stay_s - few.stay_s) / (many.inputs - few.inputs)
        return min(max(few.stay_s, few.stay_s + slope * (target - few.inputs)), many.stay_s)

    # --- what is needed -------------------------------------------------------------------------

    def _inputs(self, seen: Observation, rate: float) -> float:
        """Return the requests in flight that arrivals at `rate` come to."""
        now = seen.in_flight + seen.queued
        stay_s = self._stay_s()
        if stay_s is None:
            return min(now, rate * self.policy.panic_window_s)
        panic = self._history.window(seen.at_s - self.policy.panic_window_s)
        ahead_s = max(seen.start_s, self.policy.panic_window_s)
        return min(rate * stay_s, now + panic.rate * ahead_s)

    def _wants(self, seen: Observation, trend: float, terms: dict[str, float]) -> dict[str, float]:
        """Return what each of the slow signals asks for, in replicas."""
        policy = self.policy
        window = self._history.window(seen.at_s - policy.stable_window_s)
        carried = self._carried
        latest = self._history.window(seen.at_s - 2 * policy.panic_window_s)
        rate = min(window.rate, latest.rate_more(RECENT_SURE))  # what is over is not asked for
        terms["arrivals_per_s"] = rate
        terms["stay_s"] = self._stay_s() or 0.0
        terms["carried"] = carried
        whole = window.span_s >= policy.stable_window_s / 2
        wants = {"stable": self._inputs(seen, rate) / carried if whole else 0.0}
        if whole and not seen.coming_in_s and window.stock_s - window.flight_s < window.span_s:
            # Nothing waited, so what is in flight is what was asked, however long it stays.
            wants["inputs"] = min(window.flight_s / window.span_s, seen.in_flight) / carried
        for part in (2, 4):
            less = self._history.window(seen.at_s - policy.stable_window_s / part)
            recent = self._inputs(seen, less.rate_less(RECENT_SURE)) / carried
            wants["recent"] = max(wants.get("recent", 0.0), recent)
        if trend > rate:
            wants["trend"] = self._inputs(seen, trend) / carried
        if (
            seen.queued
            and not seen.coming_in_s
            and self._queued_for_s >= QUEUE_PANICS * policy.panic_window_s
            and not _drains(latest)
        ):
            wants["queue"] = seen.ready + ROUND_SHARE + 0.01
        if policy.target_tokens and window.span_s:
            wants["tokens"] = self._tokens(seen, window)
        if window.kv_s and window.span_s:
            wants["kv"] = window.kv_s / window.span_s / policy.kv_target
        terms.update(wants)
        return wants

    def _tokens(self, seen: Observation, window: Totals) -> float:
        """Return the replicas that waiting prompts ask for: those that came within a panic window.
        Older ones wait for what has been ordered for them."""
        stock = seen.in_flight + seen.queued
        panic = self._history.window(seen.at_s - self.policy.panic_window_s)
        recent = min(1.0, panic.arrivals / stock) if stock else 0.0
        tokens = recent * panic.tokens_s / panic.span_s if panic.span_s else 0.0
        return min(tokens, window.tokens_s / window.span_s) / self.policy.target_tokens

    def _trend(self, seen: Observation) -> float:
        """Return the rate of arrivals when a start that begins now would serve, if the history is
        a line that rises or falls beyond chance; 0.0 where it is none.

        One looks twice as far back as one wants to see ahead, and no less than the stable window.
        """
        span_s = max(self.policy.stable_window_s, 2 * seen.start_s)
        width_s = span_s / PARTS
        begin_s = seen.at_s - span_s
        parts = [
            self._history.window(begin_s + k * width_s, begin_s + (k + 1) * width_s)
            for k in range(PARTS)
        ]
        rates = [part.rate for part in parts if part.span_s >= width_s / 2]
        return rate_ahead(rates, seen.start_s / width_s)

    def _burst(self, seen: Observation, total: int, terms: dict[str, float]) -> float:
        """Return what the last seconds ask for; 0 where the room above the target has it."""
        policy = self.policy
        room = policy.panic_threshold
        if policy.max_inputs:
            room = min(room, policy.max_inputs / policy.target_inputs)
        limit = max(1, total) * room
        panic = self._history.window(seen.at_s - policy.panic_window_s)
        carried = self._carried
        rate, span_s = self._sure(seen)
        sure = self._inputs(seen, rate) / carried
        terms["burst_floor"] = sure
        terms["burst_limit"] = limit
        if sure > limit and self._burst_since_s is None:
            self._burst_since_s = seen.at_s - span_s
        if self._burst_since_s is None:
            return 0.0
        since = self._history.window(self._burst_since_s)
        lasted_s = seen.at_s - self._burst_since_s
        if sure <= limit and (
            lasted_s > policy.stable_window_s
            or (lasted_s > policy.panic_window_s and panic.rate < BURST_OVER * since.rate)
        ):
            self._burst_since_s = None
            return 0.0
        likely = self._inputs(seen, since.rate_less(LIKELY)) / carried
        backlog = min(seen.queued / carried, max(1.0, BACKLOG_SHARE * likely))
        return max(sure, likely) + backlog

    def _sure(self, seen: Observation) -> tuple[float, float]:
        """Return the highest rate that the panic window or a part of it shows beyond chance, and
        how long it has been so."""
        sure = SURE_QUEUED if seen.queued else SURE
        best = (0.0, self.policy.panic_window_s)
        for part in (1, 2, 3, 6):
            span_s = self.policy.panic_window_s / part
            window = self._history.window(seen.at_s - span_s)
            best = max(best, (window.rate_less(sure), span_s))
        return best

    def _shared(
        self, seen: Observation, total: int, need: float, terms: dict[str, float]
    ) -> tuple[float, dict[str, float]]:
        """Return the replicas needed here, with what other regions ask for and without what they
        are given; and what each of them is given."""
        foreign = seen.wanted / self._carried
        short = max(0.0, need - max(0.0, total - foreign))
        waits = seen.queued > 0 or self._burst_since_s is not None
        here = Here(
            at_s=seen.at_s,
            short=short * self._carried * waits,
            carries=self._carried,
            startable=0 if seen.blocked else self._clamped(self.policy.max, seen) - total,
            start_s=seen.start_s,
        )
        away = self._spreading.share(here, seen.elsewhere)
        given = sum(away.values()) / self._carried
        if given or foreign:
            terms.update(away=given, wanted=foreign)
        # What is given away was short: of what there is, all stays needed.
        return max(min(need, total), need - given) + foreign, away

    def _active(self, seen: Observation) -> bool:
        window = self._history.window(seen.at_s - self.policy.scaledown_window_s)
        there = seen.in_flight + seen.queued + seen.wanted
        return window.stock_s > 0.0 or window.arrivals > 0 or there > 0

    def _more(self, seen: Observation, total: int, need: float, name: str) -> str:
        """Return why more than `total` are wanted, of whom `name` asks for `need`."""
        if not total and need <= 1.0 and seen.in_flight + seen.queued > 0:
            return "a request is there, and no replica"
        if need - ROUND_SHARE > total:
            return f"{name} asks for {need:.1f}"
        return f"{need:.1f} are needed, and {self.policy.buffer} more as a buffer"

    # --- down, and the bounds -------------------------------------------------------------------

    def _lower(
        self, seen: Observation, total: int, trend: float, terms: dict[str, float]
    ) -> tuple[int, str]:
        policy = self.policy
        if self._burst_since_s is not None:
            return total, "in panic nothing is taken away"
        if self._waits_for_what_comes(seen):
            return total, "while requests wait nothing is taken away"
        hold_s = min(
            policy.scaledown_window_s,
            max(HOLD_MIN_SHARE * policy.stable_window_s, HOLD_STARTS * seen.start_s),
        )
        terms["hold_s"] = hold_s
        if total == 1:
            if self._active(seen):
                return 1, "the last one is kept while there is work"
            return 0, f"nothing came for {policy.scaledown_window_s:g} s"
        window = self._history.window(seen.at_s - hold_s)
        carried = self._carried
        rate = min(window.rate, trend) if trend else window.rate
        held = self._inputs(seen, rate) / carried
        held = max(held, seen.in_flight / carried) + seen.wanted / carried
        terms["held"] = held
        if window.span_s < 0.8 * hold_s or held > policy.scaledown_share * (total - 1):
            return total, f"work for {held:.1f} is too much for {total - 1}, so none is taken away"
        return total - 1, f"one less will do: there is work for {held:.1f}"

    def _waits_for_what_comes(self, seen: Observation) -> bool:
        """Say whether requests wait that will still wait when the next replica is there."""
        if not seen.queued or not seen.coming_in_s:
            return seen.queued > 0
        panic = self._history.window(seen.at_s - self.policy.panic_window_s)
        done = panic.departures / panic.span_s if panic.span_s else 0.0
        return done * min(seen.coming_in_s) <= seen.queued

    def _clamped(self, desired: int, seen: Observation) -> int:
        policy = self.policy
        limit = policy.max if seen.gpu_limit is None else min(policy.max, seen.gpu_limit)
        return min(max(desired, policy.min), limit)


def _drains(window: Totals) -> bool:
    """Say whether more went than came, beyond chance."""
    chance = math.sqrt(window.departures + window.arrivals)
    return window.departures - window.arrivals > DRAINS_SURE * chance


def _span_s(policy: ScalingPolicy, start_s: float = 0.0) -> float:
    return max(
        policy.stable_window_s, policy.scaledown_window_s, policy.panic_window_s, 2 * start_s
    )
