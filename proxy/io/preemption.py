"""The requests of offline work that this worker has under way, and their end for online work.

One is on the list from its dispatch to the first octet of its answer. When it has to give way
(`core.preempting` says which), its connection is cut, by which the engine stops at once, and it
waits again in the proxy: its client has seen nothing and need do nothing, keeps its place by the
time at which it came, and goes on as soon as no online work waits. Answered at once with an error,
it would come again at a time that says nothing of when there is room, and a client that repeats
only twice would have failed by a burst of a second. It is told `preempted` where there is no room
to wait.

Where the work of this proxy's other workers is in the way, they are asked to end theirs, each lease
once, and the online request waits for that: by the notes that they tell each other it is known what
they have there, so that no more goes than lets it begin. One who has begun to answer meanwhile, or
is over, is counted and left alone.

Nobody is sent back more often than `PREEMPTIONS_MAX`: then it is left alone, so that it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.core.policy import Request
from proxy.core.preempting import who_gives_way
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.preemption")


class Preemption:
    """One worker's requests that may be ended, and what it knows of the other workers'."""

    __slots__ = (
        "_ask", "_of_others", "_on_fault", "_unanswered", "asked_total", "late_total",
        "refused_total", "requeued_total",
    )  # fmt: skip

    def __init__(self, on_fault: Callable[[], None]) -> None:
        self._on_fault = on_fault
        # In the order of their dispatch, with what ends them. As many as there are leases.
        self._unanswered: dict[int, tuple[Lease, Callable[[], None]]] = {}
        self._of_others: dict[Lease, int] = {}
        self._ask: Callable[[int, str, list[int]], None] = _nobody
        self.requeued_total = 0  # wait again
        self.refused_total = 0  # found no room to
        self.asked_total = 0  # of other workers
        self.late_total = 0  # were asked for by another worker, and answered or over by then

    def know_others(
        self, unanswered: dict[Lease, int], ask: Callable[[int, str, list[int]], None]
    ) -> None:
        """`unanswered` are those of other workers, by which each is reached; `ask` reaches it."""
        self._of_others, self._ask = unanswered, ask

    def __len__(self) -> int:
        return len(self._unanswered) + len(self._of_others)

    def add(self, lease: Lease, give_way: Callable[[], None]) -> None:
        """It is dispatched; `give_way` ends it there."""
        self._unanswered[lease.lease_id] = (lease, give_way)

    def drop(self, lease: Lease) -> None:
        """It is answered, or over. Harmless when repeated."""
        self._unanswered.pop(lease.lease_id, None)
        lease.yields = False

    def make_way(
        self, request: Request, slots: Iterable[int], picture: Picture, now_s: float
    ) -> bool:
        """End what has to give way for an online request; return whether anything has."""
        unanswered = [each[0] for each in self._unanswered.values()]
        leaving = who_gives_way(request, slots, unanswered, picture, now_s)
        for lease in leaving:
            self._end(lease.lease_id)
        return bool(leaving)

    def ask_way(
        self, request: Request, places: Iterable[Collection[int]], picture: Picture, now_s: float
    ) -> None:
        """Have others' work end as well, where ours alone is not what a request waits for.

        `places` are slots, the best first. The request waits until it is told that they did.
        """
        for slots in places:
            unanswered = [lease for lease in self._of_others if lease.slot in slots]
            if not unanswered:
                continue
            unanswered += [each[0] for each in self._unanswered.values()]
            unanswered.sort(key=_begun_s)
            leaving = who_gives_way(request, slots, unanswered, picture, now_s)
            if leaving:
                self._have_end(leaving)
                return

    def _have_end(self, leaving: Sequence[Lease]) -> None:
        asked: dict[int, list[int]] = {}
        for lease in leaving:
            origin = self._of_others.pop(lease, 0)
            if origin:
                asked.setdefault(origin, []).append(lease.lease_id)
            else:
                self._end(lease.lease_id)
        for origin, lease_ids in asked.items():
            self.asked_total += len(lease_ids)
            self._ask(origin, leaving[0].replica_name, lease_ids)

    def give_way(self, lease_ids: Sequence[int]) -> None:
        """Another worker's online request needs the places of these."""
        for lease_id in lease_ids:
            self.late_total += not self._end(lease_id)

    def _end(self, lease_id: int) -> bool:
        found = self._unanswered.pop(lease_id, None)
        if found is None:
            return False
        try:
            found[1]()
        except Exception:  # noqa: BLE001 - of that request: the online one is to go on
            self._on_fault()
            _log.exception("a request that gives way")
        return True

    def counters(self) -> list[Sample]:
        return [
            Sample("preempted_total", (("outcome", "requeued"),), self.requeued_total),
            Sample("preempted_total", (("outcome", "refused"),), self.refused_total),
            Sample("preemption_asked_total", (), self.asked_total),
            Sample("preemption_late_total", (), self.late_total),
        ]


def _begun_s(lease: Lease) -> float:
    return lease.started_s


def _nobody(_origin: int, _replica_name: str, _lease_ids: list[int]) -> None:
    """There are no other workers."""
