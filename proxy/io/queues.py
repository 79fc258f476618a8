"""One that waits, and the queue of a model in which it does."""

from __future__ import annotations

from collections.abc import Callable

from proxy.core.fleet import Pool
from proxy.core.held import Held
from proxy.core.policy import Decision, Request
from proxy.core.room import Pace
from proxy.errors import ProxyError


class Waiter(Held):
    """One that waits, with whom, and whom to tell when it may wait no longer."""

    __slots__ = ("key", "on_refusal")

    def __init__(
        self,
        key: str,
        request: Request,
        pool_of: Callable[[], Pool | None],
        on_decision: Callable[[Decision], None],
        on_refusal: Callable[[ProxyError], None],
        since_s: float,
    ) -> None:
        super().__init__(request, pool_of, on_decision, since_s)
        self.key = key
        self.on_refusal = on_refusal


class Queue:
    """Those who wait for the replicas of one model, in the order in which they came."""

    __slots__ = (
        "bits", "empty_since_s", "let_be_since_s", "number", "online", "open_since_s", "pace",
        "refused_total", "start_seen", "tokens", "waiters",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.waiters: dict[Waiter, None] = {}
        self.online = 0  # of them that are online work
        self.tokens = 0  # of their prompts that no replica held when they came
        self.pace = Pace()
        self.refused_total = 0
        self.bits = -1  # the replicas that may take them; -1: nobody has looked
        self.open_since_s = 0.0  # when there was one again, after a time when there was none
        self.empty_since_s = -1.0  # since when there is none; -1: there is
        self.start_seen = False  # since then one was on its way
        self.let_be_since_s = -1.0  # since when none is any more, though one was

    def oldest_s(self, now_s: float) -> float:
        """Return the longest wait of those who wait now."""
        for waiter in self.waiters:
            return max(0.0, now_s - waiter.since_s)
        return 0.0
