"""What of each model's demand is each pool's, from look to look.

Engine workers have no part in it: nobody sends them requests. What is asked of them is lines of
jobs (`job_scaling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from backends.demand import DemandBook, summed
from backends.members import Standing
from backends.pools import Portion, Vessel, View, pour, target_inputs
from proxy.contract.demand import ModelDemand


class Portions:
    """Pours the demand that proxies report into the pools that there are."""

    def __init__(self, book: DemandBook) -> None:
        self._book = book
        self._poured: dict[str, ModelDemand] = {}  # by model, as it was poured last

    def pour(self, views: Iterable[View], before: Mapping[str, Portion]) -> dict[str, Portion]:
        """Return the portion of each pool that serves requests; `before`: as they were last."""
        models: dict[str, list[View]] = {}
        for view in views:
            if view.pool.serves == "requests":
                models.setdefault(view.pool.first.model, []).append(view)
        names = {
            model: frozenset[str]().union(*(view.names for view in views))
            for model, views in models.items()
        }
        self._book.serve(set().union(*names.values()))
        self._poured = {model: d for model, d in self._poured.items() if model in models}
        portions: dict[str, Portion] = {}
        for model, served in models.items():
            demand = self._demand(names[model], served)
            last = self._poured.get(model, demand)
            self._poured[model] = demand
            known = {view.pool.pool_id: before[view.pool.pool_id] for view in served}
            poured = pour(demand, last, list(map(_vessel, served)), known)
            portions |= self._with_regions(model, served, poured)
        return portions

    def _with_regions(
        self, model: str, views: list[View], poured: dict[str, Portion]
    ) -> dict[str, Portion]:
        """Let the last scaled pool know of other regions, who call a model by its own name."""
        scaled = [view.pool.pool_id for view in views if view.pool.autoscale is not None]
        wanted, elsewhere = self._book.wanted(model), self._book.elsewhere(model)
        if scaled and (wanted or elsewhere):
            poured[scaled[-1]] = msgspec.structs.replace(
                poured[scaled[-1]], wanted=sum(wanted.values()), elsewhere=elsewhere
            )
        return poured

    def _demand(self, names: frozenset[str], views: list[View]) -> ModelDemand:
        """Return what proxies report; where none does, what the engines say that they have."""
        demand = summed(self._book.of(name) for name in sorted(names))
        if self._book.proxies:
            return demand
        own = sum(member.in_flight for view in views for member in view.members)
        return msgspec.structs.replace(demand, in_flight=own)


def _vessel(view: View) -> Vessel:
    """Return what a pool is meant to carry; of a fixed one that aims at nothing, what it has."""
    scale, target = view.pool.autoscale, target_inputs(view.pool)
    count = scale.max if scale else len(view.standing(Standing.SERVES))
    has = sum(member.in_flight for member in view.members)
    carries = float(count * target) if target else float(has)
    return Vessel(view.pool.pool_id, carries, scaled=scale is not None)
