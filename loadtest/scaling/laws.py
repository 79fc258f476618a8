"""Who decides: ours, and what others do, each as its source says.

*knative*: the pod autoscaler of knative/serving, `pkg/autoscaler/scaling/autoscaler.go` with the
defaults of `config/core/configmaps/autoscaler.yaml`: every 2 s, windows of 60 and 6 s on
concurrency with the activator's queue, target 70 % of `containerConcurrency` (which is the lab's
`max_inputs`, so that all laws aim at the same), panic at 200 % until it is over for a stable
window, at most half down at a time. *tracking*: the horizontal pod autoscaler of Kubernetes on the
same figure, every 15 s, tolerance 0.1, up by at most 4 or 100 % a period, down to the largest of
what was recommended in 300 s. *static*: as many as the peak needs, always. *instant*: replicas that
are there the moment they are wanted. *oracle*: see `loadtest.scaling.oracle`.
"""

from __future__ import annotations

import math
from collections import deque

from backends.observation import Observation, ScalingPolicy
from backends.scaling import Scaler
from loadtest.scaling.world import Seen


class Doherty:
    """The project's own law, itself."""

    tick_s = 1.0

    def __init__(self, policy: ScalingPolicy) -> None:
        self.scaler = Scaler(policy)
        self.reason = ""

    def desired(self, seen: Seen) -> int:
        decision = self.scaler.decide(
            Observation(
                at_s=seen.at_s,
                in_flight=seen.in_flight,
                queued=seen.queued,
                queued_tokens=seen.queued_tokens,
                in_flight_tokens=seen.in_flight_tokens,
                arrivals_total=seen.arrivals_total,
                refused_total=seen.refused_total,
                kv_used_ratio=seen.kv_used_ratio,
                ready=seen.ready,
                coming_in_s=seen.coming_in_s,
                start_s=seen.start_s,
            )
        )
        self.reason = decision.reason
        return decision.desired


class Knative:
    """The pod autoscaler of Knative."""

    tick_s = 2.0

    def __init__(self, target: float, at_least: int, at_most: int) -> None:
        self.target = target
        self.bounds = (at_least, at_most)
        self._samples: deque[int] = deque(maxlen=30)  # of the stable window; three are panic's
        self._panic_since_s: float | None = None
        self._panic_size = 0

    def desired(self, seen: Seen) -> int:
        self._samples.append(seen.in_flight + seen.queued)
        recent = list(self._samples)[-3:]
        ready = max(1, seen.ready)
        down = math.floor(ready / 2)
        stable = max(down, math.ceil(sum(self._samples) / len(self._samples) / self.target))
        panic = math.ceil(sum(recent) / len(recent) / self.target)
        if panic / ready >= 2.0:
            if self._panic_since_s is None:
                self._panic_size = 0
            self._panic_since_s = seen.at_s
        elif self._panic_since_s is not None and seen.at_s - self._panic_since_s > 60.0:
            self._panic_since_s = None
        if self._panic_since_s is not None:
            self._panic_size = max(self._panic_size, stable, down, panic)
            stable = self._panic_size
        return min(max(stable, self.bounds[0]), self.bounds[1])


class Tracking:
    """The horizontal pod autoscaler of Kubernetes: a ratio, a tolerance, and patience."""

    tick_s = 15.0

    def __init__(self, target: float, at_least: int, at_most: int) -> None:
        self.target = target
        self.bounds = (at_least, at_most)
        self._recommended: deque[tuple[float, int]] = deque(maxlen=21)  # of 300 s

    def desired(self, seen: Seen) -> int:
        size = seen.ready + len(seen.coming_in_s)
        ratio = (seen.in_flight + seen.queued) / (self.target * max(1, size))
        wanted = size if abs(ratio - 1.0) <= 0.1 else math.ceil(ratio * max(1, size))
        wanted = min(max(wanted, self.bounds[0]), self.bounds[1])
        self._recommended.append((seen.at_s, wanted))
        if wanted > size:
            return min(wanted, size + max(4, size))
        return max(count for at_s, count in self._recommended if at_s > seen.at_s - 300.0)


class Static:
    """The same number, always."""

    tick_s = 60.0

    def __init__(self, count: int) -> None:
        self.count = count

    def desired(self, _: Seen) -> int:
        return self.count


class Instant:
    """What there is, over the target; for replicas that start in no time."""

    tick_s = 0.05

    def __init__(self, target: float) -> None:
        self.target = target

    def desired(self, seen: Seen) -> int:
        return max(1, math.ceil((seen.in_flight + seen.queued) / self.target))


class Planned:
    """A schedule made before: (from, size), in the order of time."""

    tick_s = 0.5

    def __init__(self, plan: list[tuple[float, int]]) -> None:
        self.plan = deque(plan)
        self.count = 1

    def desired(self, seen: Seen) -> int:
        while self.plan and self.plan[0][0] <= seen.at_s:
            self.count = self.plan.popleft()[1]
        return self.count
