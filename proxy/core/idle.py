"""How long an idle connection to a replica may be trusted, learnt from those that it has closed.

A request that meets the engine's close of an idle connection may be lost: where the close came as a
reset, nobody can prove that the request was not read, so it is not repeated. So none should be sent
into such a moment. An engine that closes a connection after some idle time will not keep others
longer; we trust them for half of that. What we would trust for less than a tenth of a second is
not worth the risk: a new connection costs a round trip.

What was learnt is unlearnt when a connection is seen to live as long as we keep any: an engine that
ended closes all its connections, and the one that comes after it may keep them again.
"""

from __future__ import annotations

from proxy.core import limits


class IdleTrust:
    """What each replica has taught. Empty while no engine closes before we do."""

    __slots__ = ("learnt",)

    def __init__(self) -> None:
        self.learnt: dict[str, float] = {}  # seconds, by replica

    def trusted_s(self, replica_id: str) -> float:
        return self.learnt.get(replica_id, limits.UPSTREAM_IDLE_S_MAX)

    def closed(self, replica_id: str, idle_s: float) -> None:
        """The engine closed a connection that was idle for so long."""
        trusted_s = idle_s / 2
        if trusted_s < limits.UPSTREAM_IDLE_WORTH_S:
            trusted_s = 0.0
        if trusted_s < self.trusted_s(replica_id):
            self.learnt[replica_id] = trusted_s

    def survived(self, replica_id: str) -> None:
        """A connection was idle for as long as we keep any, and the engine had not closed it."""
        self.learnt.pop(replica_id, None)
