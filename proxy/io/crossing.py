"""A request that crosses between regions: how it leaves, how it is taken back, how it arrives.

Until the first octet of its answer nothing is lost with the other region: a generation can be
repeated, the other side ends what nobody waits for, and so the request is chosen for anew, without
that remote, as if it had just come, but with the time that it has waited.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from typing_extensions import override

from proxy import errors
from proxy.core import claim_limits
from proxy.core.additions import with_fields
from proxy.core.fleet import Pool
from proxy.core.hop import MOVED, REFUSED, REGION
from proxy.core.http1 import HOP, Field, ResponseHead
from proxy.core.opening import has_room
from proxy.core.policy import Decision
from proxy.core.preamble import Preamble
from proxy.core.retry import Progress
from proxy.io.echoing import Echoing
from proxy.io.endings import Client
from proxy.io.hops import Arrived
from proxy.io.plane import Plane

_QUEUED: Final = Progress.QUEUED


class Crossing(Echoing):
    """What an exchange with a replica has to do with other regions."""

    __slots__ = ("_added", "_arrived", "_crossed_times", "_remote")

    def __init__(self, plane: Plane, client: Client, preamble: Preamble, length: int) -> None:
        super().__init__(plane, client, preamble, length)
        self._added = b""  # to the body, where it goes to a replica
        self._arrived: Arrived | None = None  # it comes from another region
        self._remote = ""  # where it went and is not answered yet
        self._crossed_times = 0

    @abstractmethod
    def open_for(self, decision: Decision) -> None:
        """It has waited, and now a replica is open."""

    @abstractmethod
    def _go_to(self, decision: Decision) -> None:
        """Send it there."""

    # --- it arrives --------------------------------------------------------------------------

    def _arrive(self) -> None:
        """See whether it is a hop. Raises `ProxyError`."""
        arrived = self._arrived = self._plane.hops.arrive(self._preamble, self._peer)
        if arrived is not None:
            self._principal = arrived.principal
            self._origin = arrived.claims.origin
            self._client.mind_path()

    def _lay_claims(self) -> None:
        """Have the request be what it was where it came from. Raises `ProxyError`."""
        arrived = self._arrived
        if arrived is not None:
            plane, request = self._plane, self._request
            plane.hops.check_body(arrived, self._body)
            arrived.lay_on(request, self._whole_s)
            if not plane.resides(request.regions):
                raise plane.hops.misdirected(request.regions)
            plane.hops.came(arrived, self)

    def origin_gone(self) -> None:
        """Nobody will read the answer."""
        if not self._done:
            self.client_gone()
            self._client.cut(reset=True)

    # --- it leaves ---------------------------------------------------------------------------

    def _leave(self, remote: str) -> float:
        """It goes to another region now; return how long a connection there may take."""
        hops = self._plane.hops
        self._remote = remote
        self._crossed_times += 1
        hops.left(remote, self)
        return hops.connect_timeout_s(remote)

    def _outward(self, host_field: bytes) -> tuple[bytes, bytes]:
        """Return head and body as they go out: to a replica, or to another region's proxy.

        That one gets the body as it came, and no credentials but our word.
        """
        plane, preamble = self._plane, self._preamble
        if not self._remote:
            body = with_fields(self._body, self._added) if self._added else self._body
            own = plane.authentication.engine_credential
            if own is None and self._arrived is not None:  # nobody's key has come with it
                key = plane.config.api_key
                own = b"authorization: Bearer %b\r\n" % key.encode() if key else b""
            return preamble.upstream_head(host_field, self.request_id, len(body), own), body
        host_field += plane.hops.fields(
            self._remote,
            preamble,
            self._request,
            self._body,
            request_id=self.request_id,
            principal=self._principal,
            salt=plane.salt_of(self._principal, preamble),
        )
        head = preamble.upstream_head(host_field, self.request_id, len(self._body), b"")
        return head, self._body

    def _was_refused(self, head: ResponseHead) -> bool:
        """Whether the other region has sent this request away before anybody began it.

        Then it is taken back.
        """
        if head.status < 400:
            return False
        word = dict(head.fields).get(HOP, b"")
        if word not in (REFUSED, MOVED) and head.status not in (429, 503):
            return False
        assert self._decision is not None
        replica = self._decision.replica
        if word != MOVED:  # else it may go there again, once it is known who is there
            self._request.tried.add(replica.name)
        self.take_back(f"region {replica.region} answers {head.status}")
        return True

    def take_back(self, reason: str) -> None:
        """It has crossed in vain, and not an octet of an answer has come: choose anew.

        A region that is lost or cannot be reached is out of the choice by itself, until it is back.
        """
        if self._done or not self._remote:
            return
        plane, request = self._plane, self._request
        self._drop_replica()
        self._land("taken_back")
        self._release(plane.clock.now_s(), refused=True)
        # A replica that failed it before may be there again: of this region nothing is known now.
        request.tried.intersection_update(plane.fleet.remotes)
        if self._crossed_times >= claim_limits.HOPS_TRIED_MAX:
            request.abroad = False
        self._attempts = 0
        lookup = self._route is not None and self._route.lookup
        try:
            pool = self._pool = plane.find_pool(self._model, request.regions, lookup=lookup)
            self._place(pool, plane.clock.now_s(), reason)
        except errors.ProxyError as error:
            self.fail(error)

    def _waits_to_leave(self, reason: str) -> bool:
        """Nobody here takes it: let it wait for room in another region, if one serves it."""
        plane, pool = self._plane, self._pool
        now_s = plane.clock.now_s()
        if pool is None or not plane.may_leave(self._request, pool, now_s):
            return False
        try:
            self._place(pool, now_s, reason)
        except errors.ProxyError as error:
            self.fail(error)
        return True

    def _place(self, pool: Pool, now_s: float, reason: str = "") -> None:
        """Choose, and go there or wait. Raises `ProxyError`."""
        plane, request = self._plane, self._request
        lookup = self._route is not None and self._route.lookup
        decision, held = plane.decide(request, pool, self._model, lookup=lookup, now_s=now_s)
        if held:
            self._waiter = plane.wait(
                self._model, request, self._held_bytes, self.open_for, self.fail, self._whole_s
            )
            self._progress = _QUEUED
        elif decision is not None:
            self._go_to(decision)
        else:
            self.fail(self._nobody(reason))

    def _choose_anew(self) -> Decision | None:
        """Choose among the replicas of today: the fleet may have changed meanwhile."""
        plane, lookup = self._plane, self._route is not None and self._route.lookup
        try:
            self._pool = plane.find_pool(self._model, self._request.regions, lookup=lookup)
        except errors.ProxyError:  # nobody serves it any more
            return None
        plane.catch_up()
        now_s, request = plane.clock.now_s(), self._request
        decision = plane.choose(request, self._pool, plane.picture, now_s)
        if decision is None or lookup:
            return decision
        may = has_room(decision, request, plane.picture) and plane.reserves(decision, request)
        plane.picture.loads.crowded.clear()
        return decision if may else None

    def _nobody(self, reason: str = "") -> errors.ProxyError:
        assert self._pool is not None
        in_vain = self._request.tried if self._progress is Progress.CONNECTING else ()
        return self._plane.turn_away(self._model, self._pool, in_vain, reason)

    def _land(self, outcome: str) -> None:
        """It is answered, or over: nothing brings it back any more."""
        remote, self._remote = self._remote, ""
        hops = self._plane.hops
        hops.settled(remote, self._arrived, self)
        if remote:
            hops.outcomes[remote, outcome] += 1

    @override
    def _finish(self, status: int, outcome: str) -> None:
        if self._remote or self._arrived is not None:
            self._land(outcome)
        super()._finish(status, outcome)

    # --- what its client is told -------------------------------------------------------------

    @override
    def _diagnostics(self) -> tuple[Field, ...]:
        """Where it was computed is told where it has crossed, by the region that it came to.

        That one is told here whether anybody can have begun it.
        """
        if self._arrived is not None:
            return ((HOP, REFUSED),) if self._progress < Progress.REQUEST_SENT else ()
        told, decision = super()._diagnostics(), self._decision
        if decision is None or not decision.replica.remote or any(n == REGION for n, _ in told):
            return told
        return (*told, (REGION, decision.replica.region.encode()))

    @override
    def _comment(self, now_s: float) -> None:
        """Only the first proxy begins a stream before its answer; this one's may be repeated."""
        if self._arrived is None:
            super()._comment(now_s)
