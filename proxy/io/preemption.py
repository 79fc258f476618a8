"""The requests of offline work that this worker has under way, and their end for online work.

One is on the list from its dispatch to the first octet of its answer. When it has to give way
(`core.preempting` says which), its connection is cut, by which the engine stops at once, and it
waits again in the proxy: its client has seen nothing and need do nothing, keeps its place by the
time at which it came, and goes on as soon as no online work waits. Answered at once with an error,
it would come again at a time that says nothing of when there is room, and a client that repeats
only twice would have failed by a burst of a second. It is told `preempted` where there is no room
to wait.

Nobody is sent back more often than `PREEMPTIONS_MAX`: then it is left alone, so that it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.core.policy import Request
from proxy.core.preempting import who_gives_way
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.preemption")


class Preemption:
    """One worker's requests that may be ended."""

    __slots__ = ("_on_fault", "_unanswered", "refused_total", "requeued_total")

    def __init__(self, on_fault: Callable[[], None]) -> None:
        self._on_fault = on_fault
        # In the order of their dispatch, with what ends them. As many as there are leases.
        self._unanswered: dict[int, tuple[Lease, Callable[[], None]]] = {}
        self.requeued_total = 0  # wait again
        self.refused_total = 0  # found no room to

    def __len__(self) -> int:
        return len(self._unanswered)

    def add(self, lease: Lease, give_way: Callable[[], None]) -> None:
        """It is dispatched; `give_way` ends it there."""
        self._unanswered[lease.lease_id] = (lease, give_way)

    def drop(self, lease: Lease) -> None:
        """It is answered, or over. Harmless when repeated."""
        self._unanswered.pop(lease.lease_id, None)

    def make_way(
        self, request: Request, slots: Iterable[int], picture: Picture, now_s: float
    ) -> bool:
        """End what has to give way for an online request; return whether anything has."""
        unanswered = [each[0] for each in self._unanswered.values()]
        leaving = who_gives_way(request, slots, unanswered, picture, now_s)
        for lease in leaving:
            found = self._unanswered.pop(lease.lease_id, None)
            try:
                if found is not None:
                    found[1]()
            except Exception:  # noqa: BLE001 - of that request: the online one is to go on
                self._on_fault()
                _log.exception("a request that gives way")
        return bool(leaving)

    def counters(self) -> list[Sample]:
        return [
            Sample("preempted_total", (("outcome", "requeued"),), self.requeued_total),
            Sample("preempted_total", (("outcome", "refused"),), self.refused_total),
        ]
