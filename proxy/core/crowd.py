"""How many requests each tenant has open in a worker, so that none may have all that there may be.

Whoever is there first could hold every place that `max_concurrent_requests` gives, and the next one
who comes would be refused before anybody could look at whose turn it is. So each tenant may have a
multiple of what is still free, by his weight: the more there are who want it, the less each gets,
and there is always some room for one who has nothing yet (Choudhury & Hahne, "Dynamic Queue Length
Thresholds for Shared-Memory Packet Switches", IEEE/ACM Transactions on Networking 1998). One alone
gets nearly all. Requests without a tenant are only bounded together, as they are without tenants.
"""

from __future__ import annotations

from proxy.core import claim_limits


class Crowd:
    """The open requests of one worker, by tenant."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[str, int] = {}  # as many as there are open requests, at the most

    def __len__(self) -> int:
        return len(self._open)

    def may_enter(self, tenant: str, weight: float, open_total: int, open_max: int) -> bool:
        """Whether one more of this tenant may be open besides `open_total` of all."""
        free = max(0, open_max - open_total)
        return self._open.get(tenant, 0) < claim_limits.CROWD_WEIGHT * weight * free

    def enter(self, tenant: str) -> None:
        self._open[tenant] = self._open.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One that entered is over."""
        left = self._open[tenant] - 1
        if left:
            self._open[tenant] = left
        else:
            del self._open[tenant]
