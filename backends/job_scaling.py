"""Sizes the pools of engine workers: what services tell, what workers have shown, and since when.

`offline.sizing` says how many are needed at one moment; here is what only time tells. The services
of a region have one store, so the newest report is the whole of what is left to do, and rates,
which each knows of those that report to it, are added up. A service that has been silent for
`NEEDS_AGE_S_MAX` is gone, and nobody can get lines of it. Lines that no worker of the model
understands, as these have said to any service, bring none up.

**Rates** are measured while a worker has lines to be busy with, and smoothed; until then a pool's
rate is what the planner expects, or else a guess. One that is too low starts a worker too many
where a deadline is near, and the next minute corrects it.

**Down to nothing** a pool goes when there has been no work for as long as a start takes: for so
long keeping a worker costs what bringing it back would. A manager that has just come up keeps what
it finds until a service has said what there is to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from backends.ladder import Ladder
from backends.members import Standing
from backends.observation import Decision
from backends.offline.sizing import LINES_EACH, Crew, Hand, Size, Work, size_all
from backends.offline.work import (
    NEEDS_AGE_S_MAX,
    SPARE_PREFIX,
    JobNeed,
    JobNeeds,
    spare_worker,
)
from backends.pools import Portion, View
from backends.spec import ReplicaSpec

SERVICES_MAX: Final = 16
NEEDS_MAX: Final = 64  # deadlines of one model that are told apart; later ones count as the last
RATE_GUESSED: Final = 2000.0  # tokens a second of a worker, for each of its GPUs; low on purpose
RATE_SMOOTHING: Final = 0.1  # a look a second: the last ten make two thirds
SETTLED_S: Final = 10.0  # before this a worker's rate is that of its first steps
LINGER_S_MIN: Final = 5.0


class _Heard(msgspec.Struct, frozen=True):
    needs: JobNeeds
    at_s: float


class NeedsBook:
    """The newest report of each service that lives."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    def take(self, needs: JobNeeds, now_s: float) -> bool:
        """Note a report; say whether it was news."""
        self.expire(now_s)
        before = self._heard.pop(needs.service_id, None)
        if before is not None and needs.sequence <= before.needs.sequence:
            self._heard[needs.service_id] = before
            return False
        if len(self._heard) >= SERVICES_MAX:
            return False
        self._heard[needs.service_id] = _Heard(needs, now_s)
        return True

    def expire(self, now_s: float) -> None:
        heard = self._heard.items()
        self._heard = {name: h for name, h in heard if now_s - h.at_s <= NEEDS_AGE_S_MAX}

    @property
    def told(self) -> bool:
        """Whether any service lives."""
        return bool(self._heard)

    def of(self, *models: str) -> tuple[JobNeed, ...]:
        """Return what is left to do of a model and its adapters, the earliest due first."""
        newest = max(self._heard.values(), key=lambda heard: heard.at_s, default=None)
        told = newest.needs.models if newest else {}
        needs = (n for m in models for n in told.get(m, ()) if self._understood(m, n.url))
        return _bounded(sorted(needs, key=lambda need: need.due_in_s))

    def _understood(self, model: str, url: str) -> bool:
        """Say whether a worker of the model would do such a line; yes, until one has spoken."""
        said = {u for heard in self._heard.values() for u in heard.needs.urls.get(model, ())}
        return not url or not said or url in said

    def rate(self, worker_id: str) -> float:
        """Return the tokens a second of a worker; 0.0: it has not reported lately."""
        return sum(heard.needs.rates.get(worker_id, 0.0) for heard in self._heard.values())

    def spare_rate(self, models: Collection[str]) -> float:
        """Return the tokens a second of dispatchers for models that share replicas.

        They report for all of these under one of the names.
        """
        total = 0.0
        for heard in self._heard.values():
            for worker_id, rate in heard.needs.rates.items():
                if worker_id.startswith(SPARE_PREFIX):
                    dispatcher_id = worker_id.partition(":")[0]
                    total += rate * any(worker_id == spare_worker(dispatcher_id, m) for m in models)
        return total


class JobPool(NamedTuple):
    """A pool of engine workers at one moment."""

    view: View
    launch_hash: str
    gpus: int  # of a worker, whether leased or not
    limit: int | None  # workers that the cards allow; None: any number


class JobDecision(NamedTuple):
    """How many workers a pool should have, and whether its work has moved up a class."""

    decision: Decision
    presses: bool
    portion: Portion  # lines that are left, as what waits


def _nothing(_spec: ReplicaSpec, _gpus: int) -> float | None:
    return None


class JobScaling:
    """All pools of engine workers of one manager."""

    def __init__(
        self, now_s: float, expect: Callable[[ReplicaSpec, int], float | None] = _nothing
    ) -> None:
        """`expect` returns what a worker with so many GPUs should do; None: nobody knows."""
        self._expect = expect
        self._expected: dict[str, float | None] = {}  # by launch
        self.book = NeedsBook()
        self.budget_per_hour: float | None = None
        self.spare = True  # whether lines may go to replicas of other classes
        self._since_s = now_s
        self._rates: dict[str, float] = {}  # by launch
        self._work_since_s: dict[str, float] = {}  # by model
        self._work_until_s: dict[str, float] = {}
        self._pressed: set[str] = set()

    def decide(
        self, pools: Sequence[JobPool], views: Sequence[View], ladder: Ladder, now_s: float
    ) -> list[JobDecision]:
        """Return what each of these pools needs; `views`: of all pools."""
        self.book.expire(now_s)
        models: dict[str, list[JobPool]] = {}
        for pool in pools:
            models.setdefault(pool.view.pool.first.model, []).append(pool)
        self._keep(pools, models)
        works = {
            model: self._work(model, mine, views, ladder, now_s) for model, mine in models.items()
        }
        sizes = size_all(works, self.budget_per_hour)
        for model, of_model in sizes.items():
            self._note_pressed(model, of_model)
        decisions = []
        for pool in pools:
            model, name = pool.view.pool.first.model, pool.view.pool.pool_id
            work, size = works[model], sizes[model][name]
            decision = self._decision(pool, size, work, ladder, now_s)
            portion = Portion(queued=work.lines, queued_tokens=work.tokens)
            decisions.append(JobDecision(decision, size.presses, portion))
        return decisions

    # --- what is seen ---------------------------------------------------------------------------

    def _keep(self, pools: Sequence[JobPool], models: Mapping[str, object]) -> None:
        """Forget what is not configured any more."""
        launches = {pool.launch_hash for pool in pools}
        self._rates = {name: rate for name, rate in self._rates.items() if name in launches}
        self._expected = {name: r for name, r in self._expected.items() if name in launches}
        for table in (self._work_since_s, self._work_until_s):
            for gone in table.keys() - models.keys():
                del table[gone]
        self._pressed &= models.keys()

    def _work(
        self,
        model: str,
        pools: Sequence[JobPool],
        views: Sequence[View],
        ladder: Ladder,
        now_s: float,
    ) -> Work:
        adapters = {name for pool in pools for name in pool.view.pool.first.adapters}
        needs = self.book.of(model, *sorted(adapters))
        lines = sum(need.lines for need in needs)
        if lines:
            self._work_since_s.setdefault(model, now_s)
            self._work_until_s[model] = now_s
        else:
            self._work_since_s.pop(model, None)
        for pool in pools:
            self._learn(pool, lines)
        return Work(
            needs=needs,
            crews=tuple(self._crew(pool, ladder, now_s) for pool in pools),
            spare_rate=self._spare_rate(model, views),
            waited_s=now_s - self._work_since_s.get(model, now_s),
            pressed=model in self._pressed,
        )

    def _learn(self, pool: JobPool, lines: int) -> None:
        """Take the rates of workers that have enough to do."""
        serving = pool.view.standing(Standing.SERVES)
        if lines < LINES_EACH * len(serving):
            return
        for member in serving:
            rate = self.book.rate(member.replica_id)
            if rate > 0 and member.for_s >= SETTLED_S:
                known = self._rates.get(pool.launch_hash, rate)
                self._rates[pool.launch_hash] = known + RATE_SMOOTHING * (rate - known)

    def _crew(self, pool: JobPool, ladder: Ladder, now_s: float) -> Crew:
        view, scale = pool.view, pool.view.pool.autoscale
        measured = self._rates.get(pool.launch_hash)
        gpus = max(1, pool.gpus)
        if pool.launch_hash not in self._expected:
            self._expected[pool.launch_hash] = self._expect(view.pool.first, gpus)
        expected = self._expected[pool.launch_hash] or RATE_GUESSED * gpus
        price = view.pool.first.gpu_price_per_hour
        most = scale.max if scale else view.have  # one of a fixed size is as it is
        up = [Hand(busy=member.in_flight > 0) for member in view.standing(Standing.SERVES)]
        coming = [Hand(in_s) for in_s in view.coming_in_s(ladder, hopeful=True)]
        return Crew(
            pool=view.pool.pool_id,
            rate=measured or expected,
            measured=measured is not None,
            start_s=view.up_s(ladder, now_s),
            price_per_hour=None if price is None else price * gpus,
            gpus=gpus,
            min=scale.min if scale else view.have,
            most=most if pool.limit is None else min(most, pool.limit),
            there=(*up, *coming),
            failing=any(member.failing for member in view.members),
        )

    def _spare_rate(self, model: str, views: Sequence[View]) -> float | None:
        """Return what spare capacity does for this model; None: there is nobody who could."""
        names: set[str] = set()
        for view in views:
            mine = view.pool.serves == "requests" and view.pool.first.model == model
            if mine and view.standing(Standing.SERVES):
                names |= view.names
        return self.book.spare_rate(names) if names and self.spare else None

    # --- what follows ---------------------------------------------------------------------------

    def _note_pressed(self, model: str, sizes: Mapping[str, Size]) -> None:
        if any(size.presses for size in sizes.values()):
            self._pressed.add(model)
        else:
            self._pressed.discard(model)

    def _decision(
        self, pool: JobPool, size: Size, work: Work, ladder: Ladder, now_s: float
    ) -> Decision:
        view, scale = pool.view, pool.view.pool.autoscale
        workers, reason = size.workers, size.reason
        if scale is not None and not work.lines and view.have > workers:
            linger_s = min(scale.scaledown_window_secs, view.up_s(ladder, now_s))
            since_s = self._work_until_s.get(view.pool.first.model, self._since_s)
            if not self.book.told and now_s - self._since_s < NEEDS_AGE_S_MAX:
                workers, reason = view.have, "no service has said yet what there is to do"
            elif now_s - since_s < max(LINGER_S_MIN, linger_s):
                workers, reason = view.have, f"{reason}; they wait for more a moment"
        terms = {**size.terms, "needed": float(size.workers)}
        return Decision(desired=workers, panicking=False, reason=reason, terms=terms)


def _bounded(needs: Sequence[JobNeed]) -> tuple[JobNeed, ...]:
    """Return the needs, those beyond `NEEDS_MAX` as one that is due with the first of them."""
    if len(needs) <= NEEDS_MAX:
        return tuple(needs)
    rest = needs[NEEDS_MAX - 1 :]
    together = msgspec.structs.replace(
        rest[0], lines=sum(n.lines for n in rest), tokens=sum(n.tokens for n in rest)
    )
    return (*needs[: NEEDS_MAX - 1], together)
