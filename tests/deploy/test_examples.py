"""The examples beside the guides: valid as they stand, and what their comments promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from backends.cli import main
from backends.engines import ENGINES
from backends.offline.setting import prices_of
from backends.settings import plan_of
from backends.spec import PoolSpec, pool_specs
from backends.starting import gpus_wanted
from proxy.config import load_config
from tests.fakes.programs import CLI, fetch, running

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
    kept = {config.proxy.keys_path, config.proxy.usage_log}  # nothing beside what `up` keeps
    assert {str(Path(str(path)).parent) for path in kept} == {config.manager.run_dir}
    assert config.access.models["demo"].completion_price > config.access.models["demo"].cached_price


@pytest.mark.parametrize("name", ["regions/README.md", "regions/eu.yaml", "tenants.yaml"])
def test_every_command_and_file_that_is_named_is_there(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    named = re.findall(r"doherty (\w+)", text)
    assert set(named) <= {"up", "keys", "check", "scale", "status"}
    for path in re.findall(r"deploy/[\w./-]+\.yaml", text):
        assert (FOLDER.parent / path).is_file(), path


REFERENCES = sorted((FOLDER / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_reference_configurations_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(path)]) == 0
    assert f"{path}: ok" in capsys.readouterr().out
    for named in re.findall(r"deploy/[\w./-]+", path.read_text()):
        assert (FOLDER.parent / named).exists(), named


def test_one_box_holds_the_least_of_all_and_not_the_most() -> None:
    """Which is what makes it a pool that is shared."""
    config = load_config(str(FOLDER / "examples" / "one-box-8-gpus.yaml"))
    least = most = 0
    for pool in pool_specs(config):
        each = gpus_wanted(ENGINES[pool.first.engine], pool.first)
        assert pool.autoscale is not None
        least += each * pool.autoscale.min
        most += each * pool.autoscale.max
    assert least <= 8 < most
    budget, price = config.offline.price_per_hour_max, prices_of(config.models)["qwen3-8b"]
    assert budget is not None
    assert price <= budget


def test_two_regions_name_each_other_alike() -> None:
    files = {
        name: load_config(str(FOLDER / "examples" / "two-regions" / f"{name}.yaml"))
        for name in ("eu", "us")
    }
    for name, config in files.items():
        (other,) = files.keys() - {name}
        (remote,) = config.remote_regions
        assert config.region == name
        assert (remote.region, remote.url) == (other, f"http://doherty.{other}.example:8000")
        listening = config.proxy.peer_listen or ""
        assert remote.peer == f"doherty.{other}.example:{listening.rpartition(':')[2]}"


def test_the_laptop_serves(tmp_path: Path) -> None:
    config = str(FOLDER / "examples" / "laptop.yaml")
    places = ("--port=0", "--admin-port=0", "--manager-port=0", f"--run-dir={tmp_path / 'run'}")
    with running((*CLI, "up", config, *places), tmp_path / "up.log") as up:
        url = up.until_said(r"Ready: (http://\S+)/v1")[1]
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        head = {"content-type": "application/json"}
        answer = fetch(f"{url}/v1/chat/completions", json.dumps(body).encode(), head)
        assert answer.value["usage"]["completion_tokens"] == 3
        assert answer.headers["x-doherty-replica"].startswith("demo-")
