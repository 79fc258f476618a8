"""What an engine worker should do a second before one has shown it: the planner's figure.

The planner knows types of GPUs and shapes of models; here are the names by which cards, clusters
and pools call these. Where one of them is not known there is no figure. It is for requests of the
planner's usual lengths, and holds until the first lines are done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from backends.cards import Cards
from backends.plan import make_plan
from backends.planning.command import load_shape
from backends.planning.failure import PlanError
from backends.planning.goal import DEFAULT_TARGETS, Goal
from backends.planning.hardware import GPUS, Gpu
from backends.spec import ReplicaSpec

_ACCELERATOR = "accelerator_type:"  # of Ray's resources


def gpu_type(name: str) -> Gpu | None:
    """Return the type of a card that calls itself so: NVIDIA H100 80GB HBM3 is an H100."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((gpu for key, gpu in GPUS.items() if key in words), None)


class Expectation:
    """What workers on the cards of this manager should do."""

    def __init__(self, cards: Cards) -> None:
        self._cards = cards

    def __call__(self, spec: ReplicaSpec, gpus: int) -> float | None:
        """Return tokens a second, of prompts and answers, of one worker; None: nobody knows."""
        gpu = self._type_of(spec)
        if gpu is None or not spec.engine.startswith("vllm"):
            return None
        goal = Goal(
            model=spec.model_path or spec.model,
            work="offline",
            concurrency=DEFAULT_TARGETS["offline"].concurrency,
            engine="vllm",
        )
        try:
            plan = make_plan(goal, load_shape(goal.model, os.environ | spec.env), gpu)
        except (PlanError, OSError):
            return None
        answers = plan.cost.tokens_per_s / plan.replica.gpus * max(1, gpus)
        return answers * goal.sequence_tokens / goal.answer_tokens

    def _type_of(self, spec: ReplicaSpec) -> Gpu | None:
        """Return the type of its GPUs, where all that it could get are of one."""
        said = [name for name in spec.resources if name.startswith(_ACCELERATOR)]
        leases = self._cards.leases
        names: Iterable[str] = (name.removeprefix(_ACCELERATOR) for name in said)
        if not said and leases is not None:
            names = (gpu.name for gpu in leases.inventory.gpus)
        types = {gpu.name: gpu for gpu in map(gpu_type, names) if gpu is not None}
        return next(iter(types.values())) if len(types) == 1 else None
