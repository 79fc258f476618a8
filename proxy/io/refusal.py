"""Why nobody takes a request: in the words of the client, and in those of an operator.

A model that no pool has is the client's mistake. One that a pool has is served, though nothing of
it may be awake: then a request is held while demand brings a replica up, or told to come again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from proxy.contract import ReplicaState
from proxy.core import fleet as fleets
from proxy.core.principal import ANYBODY, Principal
from proxy.core.replica import Replica
from proxy.core.room import start_retry_s
from proxy.errors import (
    MissingModelError,
    ModelNotFoundError,
    NoReplicaError,
    NotAwakeError,
    OverloadedError,
    ProxyError,
    RegionNotAllowedError,
    ReplicaUnreachableError,
)
from proxy.io.choice import Choice
from proxy.io.queues import Waiter

# States from which a replica takes requests, or soon will.
_COMING: Final = frozenset((ReplicaState.READY, ReplicaState.STARTING, ReplicaState.BACKOFF))


class Refusal(Choice):
    """A choice, and the reasons where there is none."""

    fleet_known = False

    def find_pool(
        self, model: str, within: frozenset[str] | None = None, *, lookup: bool
    ) -> fleets.Pool:
        """Return the replicas that could serve this, in these regions.

        Raises `ProxyError` when there are none.
        """
        pool = self._find_pool(model, lookup=lookup)
        if within is None:
            return pool
        resident = self.residency.within(pool, within)
        here = self.resides(within) and self._may_come(model, pool)
        if not (resident.replicas or resident.remotes or here):
            raise RegionNotAllowedError(
                f"this request may be computed in {' or '.join(sorted(within))} only, "
                f"and no replica there serves the model; it came to {self.region}"
            )
        return resident

    def _may_come(self, model: str, pool: fleets.Pool) -> bool:
        """Whether this region may have replicas of it yet: the name is not other regions' alone.

        What a replica serves is not known before it has started.
        """
        fleet = self.fleet
        if pool.replicas or not pool.remotes or not model or model in fleet.prospects:
            return True
        return not self.fleet_known or any(not r.models for r in fleet.replicas.values())

    def _find_pool(self, model: str, *, lookup: bool) -> fleets.Pool:
        fleet = self.fleet
        if lookup and (fleet.replicas or fleet.remotes):
            return fleet.everyone
        pool = fleet.pool_for(model) if model else fleet.only_pool()
        if pool is not None and not lookup:
            return pool
        ready = any(r.state is ReplicaState.READY for r in fleet.replicas.values())
        if lookup or not (ready or fleet.scaled):  # they may serve it when they are up
            raise NoReplicaError(self.no_replica_reason())
        if not model:
            raise MissingModelError("say which model is meant", "model")
        raise self.unknown_model(model)

    def unknown_model(self, model: str, principal: Principal = ANYBODY) -> ModelNotFoundError:
        """Say so, and which there are; of those that its sender may not ask for he learns none."""
        pools, may = self.fleet.pools, principal.models
        known = ", ".join(sorted(pools if may is None else pools.keys() & may)[:20]) or "none"
        return ModelNotFoundError(
            f"the model {model!r} is not served here; served: {known}", "model"
        )

    def nobody(
        self, model: str, pool: fleets.Pool, in_vain: Collection[str], reason: str
    ) -> ProxyError:
        """Return why nobody takes a request; `in_vain` could not be reached, the last for this."""
        if in_vain:
            return ReplicaUnreachableError(
                f"no replica could be reached; tried {', '.join(sorted(in_vain))}"
                + (f"; the last one: {reason}" if reason else "")
            )
        if pool.available:
            return OverloadedError("every replica has as many requests as it may hold")
        prospect = self.prospect_of(self.queue_of(model))
        if prospect.wakes:
            return NotAwakeError(
                "nothing of this model is awake, and no request may wait (--queue-size)",
                wait_s=start_retry_s(prospect),
            )
        return NoReplicaError(self.no_replica_reason(pool))

    def turn_away(
        self, model: str, pool: fleets.Pool, in_vain: Collection[str], reason: str
    ) -> ProxyError:
        """Say `nobody` to a request: what it asked for counts, though it does not wait."""
        error = self.nobody(model, pool, in_vain, reason)
        if isinstance(error, OverloadedError | NotAwakeError):
            self.waiting.queue(self.queue_of(model)).refused_total += 1
        if isinstance(error, NotAwakeError):
            self.waiting.on_hold()
        return error

    def end_of_wait(self, waiter: Waiter, now_s: float) -> ProxyError | None:
        """Return why a request should wait no longer, if so."""
        pool, config = self.awaited(waiter.key, waiter.request.regions), self.config
        coming = pool is not None and any(r.state in _COMING for r in pool.replicas.values())
        coming = coming or self.prospect_of(waiter.key).wakes
        if not coming and not self.may_leave(waiter.request, pool, now_s):
            return NoReplicaError(self.no_replica_reason(pool))
        return self.waiting.end_of_wait(
            waiter,
            now_s,
            queue_timeout_s=config.queue_timeout_secs,
            hold_timeout_s=config.hold_timeout_secs,
        )

    def no_replica_reason(self, pool: fleets.Pool | None = None) -> str:
        """Say why nobody can take a request, in words that tell an operator what to do.

        With `pool`, of its replicas alone: those of other models could not take it anyway.
        """
        replicas, whose = list(self.fleet.servers.values()), ""
        if pool is not None and pool.replicas:
            replicas = list({r.replica_id: r for r in pool.replicas.values()}.values())
            same = [
                m for m, p in self.fleet.pools.items() if p.replicas.keys() == pool.replicas.keys()
            ]
            # Where there are tenants, a replica may serve models under names of one of them.
            tell = same and not self.config.access.tenants
            whose = f" of {' or '.join(sorted(same)[:3])}" if tell else ""
        remotes = pool.remotes if pool is not None else tuple(self.fleet.remotes.values())
        away = self._remotes_shown(remotes) if remotes else ""
        if not replicas:
            if away:
                return f"nothing that may take the request runs in this region{away}"
            if self.fleet_known:
                return "the replica list is empty; start replicas or pass --worker-urls"
            return "the fleet is not known yet; the manager has not answered"
        states: dict[str, int] = {}
        for replica in replicas:
            word = "unreachable" if replica.suspect else str(replica.state)
            if replica.state is ReplicaState.READY and replica.asleep:
                word = "asleep"
            states[word] = states.get(word, 0) + 1
        shown = ", ".join(f"{count} {word}" for word, count in sorted(states.items()))
        return f"no replica{whose} can take the request now: {shown}{away}"

    def _remotes_shown(self, remotes: Sequence[Replica]) -> str:
        """Say of other regions why nothing goes there."""
        found: dict[str, str] = {}
        for remote in remotes:
            slot = self.picture.slots.get(remote.name, -1)
            outlook = self.picture.outlooks.of.get(slot)
            reason = outlook.why_not(self.clock.now_s()) if outlook is not None else "not known"
            found.setdefault(remote.region, reason or "no room")
        return "".join([f"; {region}: {reason}" for region, reason in sorted(found.items())])
