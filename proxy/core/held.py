"""One request that waits, and its place in the order that classes, deadlines and sizes make.

Shortest first with ageing: by the least prefill that the request needs on any replica, less the
time it has waited. As everybody ages alike, the place never changes: it is that prefill plus the
time of arrival, each in seconds. Less urgent classes stand as if they had come later, by more than
most queues are long: so online work goes first, and still nobody waits for ever (`core.classes`).

One that has a deadline stands where one of its class would that has the same moment for its own:
each has `OBJECTIVE_S` to begin unless it says otherwise. So those with deadlines are served in
their order, and the earliest deadline first is the order by which all are met if any can meet all
(Liu & Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment", JACM
1973). A deadline never makes a request one of another class: it moves it less than classes lie
apart. Once it cannot be met any more, under the same order all behind it would be late as well; so
it stands from then on like work that may wait, behind those that can still meet theirs.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.core import claim_limits, limits
from proxy.core.classes import OFFLINE, ONLINE, SEMI_ONLINE, YIELD_S
from proxy.core.fairness import Account
from proxy.core.fleet import Pool
from proxy.core.policy import Decision, Request


class Held:
    """One request that waits, and what is called with its decision when that has come."""

    __slots__ = (
        "account", "gone", "held_bytes", "late", "line", "needed_tokens", "on_decision", "order",
        "pool_of", "prefill_s", "queue", "rank_s", "request", "since_s", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        pool_of: Callable[[], Pool | None],
        on_decision: Callable[[Decision], None],
        since_s: float,
    ) -> None:
        """`pool_of` returns the pool as it is now: the fleet changes while one waits."""
        self.request = request
        self.pool_of = pool_of
        self.on_decision = on_decision
        self.since_s = since_s
        self.account: Account | None = None  # its tenant's; None: there are no tenants
        self.rank_s = 0.0
        self.prefill_s = 0.0  # the least that it needed on any replica when it came
        self.order = 0
        self.line = -1
        self.queue = 0  # the number of what it waits for, the same for all who wait for the same
        self.held_bytes = 0  # of its body
        self.needed_tokens = 0  # of its prompt that no replica held when it came
        self.tokens = 0  # what it would have computed where it has reserved its place
        self.late = False  # it cannot meet its deadline any more
        self.gone = False


def class_of(held: Held) -> int:
    """Return the class of one that waits; what nobody has said is online work."""
    return max(ONLINE, held.request.work_class)


def yields(held: Held, now_s: float) -> bool:
    """Whether one that waits lets all online work go first, wherever that waits.

    It does for as long as its rank yields to it: so it may wait long, and not for ever.
    """
    return class_of(held) == OFFLINE and now_s - held.since_s < YIELD_S[OFFLINE]


def rank_s(held: Held) -> float:
    """Return its place among those of its tenant, the least first."""
    stands_s = held.since_s + YIELD_S[_standing(held)]
    request = held.request
    if request.deadline_s > 0.0 and not held.late:
        later_s = request.deadline_s - held.since_s - claim_limits.OBJECTIVE_S
        if request.deadline_s == request.listens_until_s:  # patience is no wish to be served late
            later_s = min(0.0, later_s)
        stands_s += min(claim_limits.DEADLINE_YIELD_S_MAX, max(-claim_limits.OBJECTIVE_S, later_s))
    return stands_s * limits.AGEING_WEIGHT + max(0.0, held.prefill_s)


def band(held: Held, now_s: float) -> int:
    """Return as which class it stands among those of other tenants: none yields for ever."""
    standing = _standing(held)
    return standing if now_s - held.since_s < YIELD_S[standing] else ONLINE


def _standing(held: Held) -> int:
    return max(SEMI_ONLINE, class_of(held)) if held.late else class_of(held)


def begin_by_s(held: Held) -> float:
    """Return when it would have to begin, to meet its deadline where that is possible soonest.

    For one that has missed it, the same for its client's patience; 0: nobody knows of any.
    """
    until_s = held.request.listens_until_s if held.late else held.request.deadline_s
    return until_s - max(0.0, held.prefill_s) if until_s > 0.0 else 0.0


def is_vain(held: Held, now_s: float) -> bool:
    """Whether nobody will listen any more when its first token could come."""
    until_s = held.request.listens_until_s
    return 0.0 < until_s < now_s + max(0.0, held.prefill_s)
