"""The examples beside the README: valid as they stand, and what their comments promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.offline.setting import prices_of
from backends.settings import plan_of
from backends.spec import PoolSpec, pool_specs
from proxy.config import load_config

FOLDER = Path(__file__).parents[2] / "deploy"


def pools(name: str) -> dict[str, PoolSpec]:
    """Return the pools of a file that `doherty up` takes."""
    plan = plan_of({"config": str(FOLDER / name)}, {})
    assert plan.serves_jobs
    return {pool.pool_id: pool for pool in pool_specs(plan.config)}


@pytest.mark.parametrize("name", ["offline.yaml", "ray-local.yaml"])
def test_workers_of_jobs_stand_beside_replicas_and_go_to_zero(name: str) -> None:
    found = pools(name)
    assert found["demo"].replicas == 2
    workers = found["demo-jobs"]
    assert workers.autoscale is not None
    assert workers.autoscale.min == 0
    assert workers.first.work_class == "offline"
    assert all(pool.first.engine.startswith("simulator") for pool in found.values())


def test_the_budget_is_enough_for_all_workers() -> None:
    config = load_config(str(FOLDER / "offline.yaml"))
    workers, budget = (
        pools("offline.yaml")["demo-jobs"].autoscale,
        config.offline.price_per_hour_max,
    )
    assert workers is not None
    assert budget is not None
    assert prices_of(config.models)["demo"] * workers.max <= budget


def test_the_local_cluster_has_a_gpu_for_everybody() -> None:
    ray = load_config(str(FOLDER / "ray-local.yaml")).manager.ray
    most = {
        pool.pool_id: pool.autoscale.max if pool.autoscale else pool.replicas
        for pool in pools("ray-local.yaml").values()
    }
    assert ray.address == "local"
    assert ray.local_gpus == sum(number or 0 for number in most.values())
