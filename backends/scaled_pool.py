"""One pool of a manager and what is remembered of it from look to look: its law, its last decision.

Of a pool of a fixed size nobody decides: it wants what it was told. It is looked at all the same,
for its replicas hold cards that others may want, and whoever scales it from outside reads here what
it needs. What pools of engine workers need follows from jobs (`job_scaling`), all models at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from backends.ladder import Ladder
from backends.members import Standing
from backends.observation import Decision, Observation
from backends.pools import Portion, View, policy_of, target_inputs
from backends.scaling import Scaler
from backends.scaling_report import NOTES_MAX, Note, PoolReport
from backends.spec import PoolSpec
from proxy.contract import PoolRecord


class ScaledPool:
    """A pool, its size as wanted now, and the changes of mind that led there."""

    def __init__(self, pool: PoolSpec, now_s: float) -> None:
        policy, scale = policy_of(pool), pool.autoscale
        self.pool = pool
        self.portion = Portion()
        self.presses = False  # its jobs have moved up a class
        self.waiting = ""  # why one that is wanted does not come
        self.refused = False  # and will not, as things are
        self.crowded_until_s = 0.0
        self.observation = Observation(at_s=now_s)
        self.decision: Decision | None = None
        self.granted: Mapping[str, float] = {}  # what the arbiter went by, and how many it allows
        self.notes: deque[Note] = deque(maxlen=NOTES_MAX)
        self.fixed = pool.replicas  # of a pool that is not scaled; others may set it
        self.desired = scale.min if scale else pool.replicas or 0
        self._scaler = Scaler(policy) if policy else None
        self._since_s = now_s
        self._noted: tuple[int, bool] = (self.desired, False)

    @property
    def scaled(self) -> bool:
        return self.pool.autoscale is not None

    def replace(self, pool: PoolSpec, now_s: float) -> None:
        """Take over new settings; what the law has learnt of the load stays true."""
        policy = policy_of(pool)
        if policy is None:
            self._scaler, self.decision = None, None  # of workers the next look decides again
        elif self._scaler is None:
            self._scaler, self._since_s = Scaler(policy), now_s
        else:
            self._scaler.policy = policy
        self.pool, self.fixed = pool, pool.replicas
        self.desired = self.desired if pool.autoscale else pool.replicas or 0

    def decide(self, view: View, ladder: Ladder, now_s: float, gpu_limit: int | None) -> None:
        """Ask the law how many should serve."""
        self.observation = view.observation(ladder, now_s, gpu_limit, blocked=self.refused)
        if self._scaler is None:
            self.desired = self.fixed or 0
            return
        policy = self._scaler.policy
        decision = self._scaler.decide(self.observation)
        if now_s - self._since_s < policy.scaledown_window_s and decision.desired < view.have:
            kept = max(decision.desired, min(view.have, policy.max))
            reason = f"{decision.reason}; {kept} are kept, for this manager is new to the load"
            decision = msgspec.structs.replace(decision, desired=kept, reason=reason)
        self.decision, self.desired = decision, decision.desired

    def record(self, view: View, ladder: Ladder, now_s: float, free: int | None) -> PoolRecord:
        """Return what the proxies are told of it, under the model's own name.

        `free`: the cards that nobody has. What it is to have and has not got yet, it could not
        start for others as well.
        """
        startable = 0
        if not self.waiting:
            ordered = max(0, self.desired - view.have)
            startable = max(0, view.startable(free, self.observation.gpu_limit) - ordered)
        record = view.record(ladder, now_s, startable)
        away = self.decision.away if self.decision else {}
        asked = {region: float(math.ceil(inputs)) for region, inputs in away.items()}
        return msgspec.structs.replace(record, wanted=asked)

    def settle(self, decision: Decision, observation: Observation) -> None:
        """Take what was decided of a pool of engine workers."""
        self.observation, self.decision = observation, decision
        self.desired = decision.desired if self.scaled else self.fixed or 0

    def note(self, moves: Sequence[str], unix_s: float) -> Note | None:
        """Return a change of mind, or of what is done, to be told; None: nothing is new."""
        panicking = self.decision is not None and self.decision.panicking
        was, panicked = self._noted
        if (was, panicked) == (self.desired, panicking) and not moves:
            return None
        self._noted = self.desired, panicking
        note = Note(
            at_s=unix_s,
            pool=self.pool.pool_id,
            was=was,
            desired=self.desired,
            panicking=panicking,
            reason=self.decision.reason if self.decision else "as it was told",
            terms={**self.granted, **(self.decision.terms if self.decision else {})},
            moves=tuple(moves),
        )
        self.notes.append(note)
        return note

    def report(self, view: View) -> PoolReport:
        scale, fixed = self.pool.autoscale, self.fixed or 0
        return PoolReport(
            pool=self.pool.pool_id,
            model=self.pool.first.model,
            work_class=self.pool.first.work_class,
            serves=self.pool.serves,
            presses=self.presses,
            scaled=scale is not None,
            min=scale.min if scale else fixed,
            max=scale.max if scale else fixed,
            target_inputs=target_inputs(self.pool),
            desired=self.desired,
            ready=len(view.standing(Standing.SERVES)),
            coming=len(view.standing(Standing.COMING)),
            going=len(view.standing(Standing.GOING)),
            held=len(view.standing(Standing.HELD)),
            resting={m.replica_id: m.rung.value for m in view.standing(Standing.RESTS)},
            waiting=self.waiting,
            observation=self.observation,
            decision=self.decision,
            notes=tuple(self.notes),
        )


def records_of(
    pools: Mapping[str, ScaledPool],
    views: Mapping[str, View],
    ladder: Ladder,
    now_s: float,
    free: int | None,
) -> tuple[PoolRecord, ...]:
    """Return what the proxies are told of all pools, for each name that a pool answers to."""
    records: list[PoolRecord] = []
    for pool_id, view in views.items():
        if view.pool.serves == "jobs":
            continue
        record = pools[pool_id].record(view, ladder, now_s, free)
        again = msgspec.structs.replace(record, wanted={})  # the same replicas, by another name
        names = sorted(view.pool.first.adapters)
        records += [record, *(msgspec.structs.replace(again, model=name) for name in names)]
    return tuple(records)
