"""What one worker has to do with requests that cross between regions, in both directions.

A request that comes with a hop's field is that region's word or nothing: what cannot be believed is
refused, and never served as if the field were not there. One that has been here before is a loop,
whatever else it says. One that this region may not compute, or is not to send on, is not kept.

A request that waits in another region for its first octet is taken back in the moment in which that
region is lost, and chosen for anew; and over there, where the same is seen from the other side, it
is ended, so that nobody computes what nobody will read. What has begun to answer is left to its
connection.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from proxy.config import ProxyConfig
from proxy.contract.regions import RemoteState
from proxy.core import claim_limits, limits
from proxy.core.classes import OFFLINE, UNSAID
from proxy.core.hop import (
    MOVED,
    NONCE_BYTES,
    Claims,
    HopError,
    body_digest,
    check_body,
    check_hop,
    has_passed,
    read_hop,
    via_of,
    write_hop,
)
from proxy.core.http1 import HOP
from proxy.core.nonces import Nonces, memory_bytes
from proxy.core.policy import Request
from proxy.core.preamble import Preamble
from proxy.core.principal import Principal
from proxy.errors import HopMisdirectedError, HopRefusedError
from proxy.io.clock import Clock
from proxy.io.telemetry import Sample

_UNLINKED: Final = RemoteState(name="", region="", url="")


class Traveller(Protocol):
    """A request that has crossed, or is to, and has not been answered yet."""

    def take_back(self, reason: str) -> None:
        """Where it was sent is lost: choose anew."""

    def origin_gone(self) -> None:
        """Where it comes from is lost: nobody will read its answer."""


class Arrived:
    """A request that another region has sent here, and what that says of it."""

    __slots__ = ("claims", "principal")

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        principal = self.principal = Principal(claims.tenant, claims.key_id)
        principal.crossed = True
        principal.weight = claims.weight
        principal.default_class = claims.work_class
        principal.regions = None if claims.regions is None else frozenset(claims.regions)
        principal.isolated = claims.isolated
        principal.salt = claims.salt

    def lay_on(self, request: Request, now_s: float) -> None:
        """Make the request what it was where it came from; it may go no further."""
        claims = self.claims
        request.abroad = False
        if claims.work_class != UNSAID:
            request.work_class = claims.work_class
            request.weight = limits.FLEX_WEIGHT if claims.work_class == OFFLINE else 1.0
        request.deadline_s = 0.0 if claims.deadline_s is None else now_s + claims.deadline_s
        request.listens_until_s = 0.0 if claims.listens_s is None else now_s + claims.listens_s
        request.tpot_s = claims.tpot_s


class Hops:
    """All hops of one worker."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        self._clock = clock
        self._ours = b""  # the life of this proxy; empty: no region is told of it
        self._nonces: Nonces | None = None
        self._remotes: dict[str, RemoteState] = {}  # by name
        self._away: dict[str, set[Traveller]] = {}  # by remote
        self._here: dict[bytes, set[Traveller]] = {}  # by the life of the proxy they come from
        self.refused: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by remote and what became of it
        self.arrived: Counter[str] = Counter()  # by region
        self.follow(config)

    def follow(self, config: ProxyConfig) -> None:
        """Go on as `config` says, from the next request on."""
        self._region, self._key = config.region, config.peer_key
        self._regions = frozenset([each.region for each in config.access.remote_regions])
        self._via = b"via: %b\r\n" % via_of(config.region)

    def share(self, nonces: Nonces) -> None:
        """Other workers take hops as well: these are the numbers that all have used."""
        self._nonces = nonces

    # --- what comes --------------------------------------------------------------------------

    def arrive(self, preamble: Preamble, peer: str) -> Arrived | None:
        """Return the hop that a head is; None: it only says that it has crossed elsewhere.

        `peer` is the address that it comes from. Raises `ProxyError`.
        """
        try:
            claims = self._read(preamble, peer)
        except HopError as error:
            raise self._refusal(error.kind, str(error)) from None
        if claims is None:
            return None
        self.arrived[claims.origin] += 1
        return Arrived(claims)

    def check_body(self, arrived: Arrived, body: bytes) -> None:
        """Raises `HopRefusedError` where the body is not the one that was signed."""
        try:
            check_body(arrived.claims, body)
        except HopError as error:
            raise self._refusal(error.kind, str(error)) from None

    def refuse(self, preamble: Preamble) -> None:
        """Nothing may cross on this path: raises `HopRefusedError` for what tries to."""
        if preamble.hop is not None or has_passed(preamble.via, self._region):
            raise self._refusal("unexpected", "no hop leads to this path")

    def misdirected(self, regions: Iterable[str] | None) -> HopMisdirectedError:
        """It may be computed in these regions only, and this is none of them."""
        self.refused["misdirected"] += 1
        where = " or ".join(sorted(regions or ())) or "no region"
        return HopMisdirectedError(f"this is {self._region}; it may be computed in {where} only")

    def _refusal(self, kind: str, reason: str) -> HopRefusedError:
        self.refused[kind] += 1
        said = f"{HOP.decode()} is not taken: {reason}"
        if kind == "moved":
            return HopRefusedError(said, told=MOVED)
        return HopRefusedError(said)

    def _read(self, preamble: Preamble, peer: str) -> Claims | None:
        if has_passed(preamble.via, self._region):
            raise HopError("loop", f"it has been in region {self._region} before")
        if preamble.hop is None:
            return None
        if not self._ours:
            raise HopError("unexpected", "this proxy knows no other regions")
        if self._key is None and not _is_near(peer):
            raise HopError("unsigned", "without a peer_key it may only come from this machine")
        claims = read_hop(preamble.hop, self._key, preamble.method, preamble.target)
        if claims.origin not in self._regions:
            raise HopError("stranger", "it comes from a region that is not configured here")
        check_hop(
            claims,
            region=self._region,
            proxy_id=self._ours,
            request_id=preamble.request_id,
            unix_s=self._clock.unix_s(),
        )
        if self._nonces is None:
            self._nonces = Nonces(memoryview(bytearray(memory_bytes(1))).cast("Q"), 0, 1)
        if not self._nonces.use(claims.nonce, claims.unix_s):
            raise HopError("replayed", "it has been taken before")
        return claims

    # --- what goes ---------------------------------------------------------------------------

    def fields(
        self, remote: str, preamble: Preamble, request: Request, body: bytes, *,
        request_id: bytes, principal: Principal, salt: str,
    ) -> bytes:  # fmt: skip
        """Return the fields by which another region will believe this request."""
        state = self._remotes.get(remote, _UNLINKED)
        now_s = self._clock.now_s()
        deadline_s, listens_until_s = request.deadline_s, request.listens_until_s
        claims = Claims(
            request_id=request_id.decode("ascii"),
            origin=self._region,
            origin_id=self._ours,
            region=state.region,
            proxy_id=state.proxy_id,
            unix_s=self._clock.unix_s(),
            nonce=os.urandom(NONCE_BYTES),
            body_digest=body_digest(body),
            tenant=request.tenant or principal.tenant,
            key_id=principal.key_id,
            weight=request.tenant_weight,
            work_class=request.work_class,
            regions=None if request.regions is None else sorted(request.regions),
            deadline_s=deadline_s - now_s if deadline_s else None,
            tpot_s=request.tpot_s,
            isolated=principal.isolated,
            salt=salt,
            listens_s=listens_until_s - now_s if listens_until_s else None,
        )
        hop = write_hop(claims, self._key, preamble.method, preamble.target)
        return b"%b: %b\r\n%b" % (HOP, hop, self._via)

    def connect_timeout_s(self, remote: str) -> float:
        round_trip_s = self._remotes.get(remote, _UNLINKED).round_trip_s
        return max(claim_limits.HOP_CONNECT_S_MIN, claim_limits.HOP_CONNECT_WEIGHT * round_trip_s)

    # --- who is under way --------------------------------------------------------------------

    def know(self, remotes: Sequence[RemoteState], ours: bytes) -> list[str]:
        """This is what is known now of other regions; see to those whose region is lost.

        Returns the names of those that are.
        """
        before, self._remotes = self._remotes, {remote.name: remote for remote in remotes}
        self._ours = ours
        lost = []
        for name, state in before.items():
            now = self._remotes.get(name, _UNLINKED)
            if state.linked and not now.linked:
                lost.append(name)
                for traveller in self._away.pop(name, ()):
                    traveller.take_back(f"region {state.region} is lost")
                for traveller in self._here.pop(state.proxy_id, ()):
                    traveller.origin_gone()
        return lost

    def left(self, remote: str, traveller: Traveller) -> None:
        """It is on its way there."""
        self._away.setdefault(remote, set()).add(traveller)

    def came(self, arrived: Arrived, traveller: Traveller) -> None:
        """It is to be answered here. Kept in mind only while its origin is known to be there."""
        origin_id = arrived.claims.origin_id
        if any(each.linked and each.proxy_id == origin_id for each in self._remotes.values()):
            self._here.setdefault(origin_id, set()).add(traveller)

    def settled(self, remote: str, arrived: Arrived | None, traveller: Traveller) -> None:
        """It is answered, or over. Harmless when repeated."""
        if remote:
            _discard(self._away, remote, traveller)
        if arrived is not None:
            _discard(self._here, arrived.claims.origin_id, traveller)

    # --- what is reported --------------------------------------------------------------------

    def counters(self) -> list[Sample]:
        return [
            *[
                Sample("hops_refused_total", (("reason", reason),), count)
                for reason, count in self.refused.items()
            ],
            *[
                Sample("hops_arrived_total", (("region", region),), count)
                for region, count in self.arrived.items()
            ],
            *[
                Sample("hops_sent_total", (("remote", remote), ("outcome", outcome)), count)
                for (remote, outcome), count in self.outcomes.items()
            ],
        ]

    def gauges(self) -> list[Sample]:
        return [
            Sample("hops_waiting", (("direction", "out"),), _count(self._away.values())),
            Sample("hops_waiting", (("direction", "in"),), _count(self._here.values())),
        ]


def _discard(travellers: dict, key: str | bytes, traveller: Traveller) -> None:  # type: ignore[type-arg]
    those = travellers.get(key)
    if those is not None:
        those.discard(traveller)
        if not those:
            del travellers[key]


def _count(travellers: Iterable[set[Traveller]]) -> int:
    return sum([len(those) for those in travellers])


def _is_near(peer: str) -> bool:
    try:
        return ipaddress.ip_address(peer.partition("%")[0]).is_loopback
    except ValueError:
        return False
