"""The examples beside the guides: valid as they stand, and what their comments promise."""

from __future__ import annotations

import re
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


REGIONS = ("eu", "us", "ap")


def test_the_regions_name_each_other_where_they_listen() -> None:
    files = {name: load_config(str(FOLDER / "regions" / f"{name}.yaml")) for name in REGIONS}
    ports: list[int] = []
    for name, config in files.items():
        assert config.region == name
        ports += [config.proxy.port, config.proxy.admin_port, config.manager.port]
        assert config.manager.run_dir.endswith(name)
        remotes = {remote.region: remote for remote in config.remote_regions}
        assert remotes.keys() == files.keys() - {name}
        for region, remote in remotes.items():
            assert remote.url == f"http://127.0.0.1:{files[region].proxy.port}"
            assert remote.peer == files[region].proxy.peer_listen
    assert len(set(ports)) == len(ports), "they run beside each other"
    only = {model.name: model.regions for config in files.values() for model in config.models}
    assert only == {"demo": (), "demo-eu": ("eu",)}


def test_the_tenants_ask_for_no_more_than_they_may() -> None:
    config = load_config(str(FOLDER / "tenants.yaml"))
    assert [tenant.name for tenant in config.tenants] == ["product", "research", "nightly"]
    assert {config.region} == set(config.tenants[2].regions)
    assert config.access.models["demo"].completion_price > config.access.models["demo"].cached_price


@pytest.mark.parametrize("name", ["regions/README.md", "regions/eu.yaml", "tenants.yaml"])
def test_every_command_and_file_that_is_named_is_there(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    named = re.findall(r"doherty (\w+)", text)
    assert set(named) <= {"up", "keys", "check", "scale", "status"}
    for path in re.findall(r"deploy/[\w./-]+\.yaml", text):
        assert (FOLDER.parent / path).is_file(), path
