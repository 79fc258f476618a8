"""Deadlines of first tokens: what becomes of who misses his, and how many did.

A request whose deadline cannot be met any more would be served in vain, if its client has gone by
then, and late at any rate; under overload each that is served so makes the next one late. So it
waits behind those that can still meet theirs, or is told at once, as the configuration says
(`classes.late`). Being told so late a client should not repeat the request by itself: it would be
as late again, and the next one with it.
"""

from __future__ import annotations

from proxy import errors
from proxy.core.classes import NAMES, ONLINE
from proxy.core.held import class_of
from proxy.core.policy import Request
from proxy.io.queues import Queue, Waiter
from proxy.io.telemetry import Sample

# Ends that say nothing of us: the client left, or asked for what cannot be.
_NOT_OURS = 400
_OURS = frozenset((408, 429))


class Lateness:
    """What one worker does about deadlines, and what came of them, by class."""

    def __init__(self) -> None:
        self.shed = False  # who is late is told so, and not served
        self._met = [0 for _ in NAMES]
        self._missed = [0 for _ in NAMES]
        self._shed = [0 for _ in NAMES]

    def refusal(self, waiter: Waiter, _: Queue) -> errors.ProxyError:
        late_ms = 1e3 * (waiter.request.deadline_s - waiter.since_s)
        return errors.DeadlineExceededError(
            f"no {NAMES[class_of(waiter)]} request can have its first token within "
            f"{late_ms:.0f} ms now"
        )

    def count(self, request: Request, first_octet_s: float, status: int, outcome: str) -> None:
        """A request that had a deadline is over; `first_octet_s` is 0 where none came."""
        work_class = max(ONLINE, request.work_class)
        if outcome == errors.DeadlineExceededError.code:
            self._shed[work_class] += 1
        elif first_octet_s and status < _NOT_OURS:
            if first_octet_s <= request.deadline_s:
                self._met[work_class] += 1
            else:
                self._missed[work_class] += 1
        elif status >= 500 or status in _OURS:
            self._missed[work_class] += 1

    def counters(self) -> list[Sample]:
        return [
            Sample(f"deadline_{name}_total", (("class", NAMES[number]),), count)
            for name, counts in (
                ("met", self._met),
                ("missed", self._missed),
                ("shed", self._shed),
            )
            for number, count in enumerate(counts)
        ]
