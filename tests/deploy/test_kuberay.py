"""The example for Kubernetes: well-formed, of one mind with itself, and Doherty's part is valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.engines import ENGINES
from backends.providers.ray_words import Need, waits_for
from backends.spec import pool_specs
from backends.starting import gpus_wanted
from proxy.config import parse_config

FOLDER = Path(__file__).parents[2] / "deploy" / "kuberay"
RAY_PORT_MAX = 19_999  # of Ray's workers where nobody says otherwise (ray start --help)


def documents() -> dict[str, dict[str, Any]]:
    files = ("raycluster.yaml", "doherty.yaml")
    found = [d for name in files for d in yaml.safe_load_all((FOLDER / name).read_text())]
    return {document["kind"]: document for document in found}


CONFIG = parse_config(documents()["ConfigMap"]["data"]["doherty.yaml"], "doherty.yaml")
CLUSTER = documents()["RayCluster"]["spec"]
GROUPS = CLUSTER["workerGroupSpecs"]


def containers(kind: str) -> dict[str, dict[str, Any]]:
    spec = documents()[kind]["spec"]["template"]["spec"]
    return {container["name"]: container for container in spec["containers"]}


def offered(group: dict[str, Any]) -> dict[str, float]:
    """Return what a node of the group has, as Ray counts it."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    own = json.loads(json.loads(group["rayStartParams"]["resources"]))
    return {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])} | own


def test_the_kinds_are_those_that_are_applied() -> None:
    versions = {kind: document["apiVersion"] for kind, document in documents().items()}
    assert versions == {
        "RayCluster": "ray.io/v1",
        "ConfigMap": "v1",
        "StatefulSet": "apps/v1",
        "Service": "v1",
    }


def test_every_group_has_what_the_crd_requires_and_parameters_are_text() -> None:
    assert set(CLUSTER["headGroupSpec"]) >= {"rayStartParams", "template"}
    for group in GROUPS:
        assert set(group) >= {"groupName", "maxReplicas", "minReplicas", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (CLUSTER["headGroupSpec"], *GROUPS):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("pool", pool_specs(CONFIG), ids=lambda pool: pool.pool_id)
def test_every_pool_finds_a_group_that_can_hold_it(pool: Any) -> None:
    spec = pool.first
    need = Need(gpus_wanted(ENGINES[spec.engine], spec), spec.resources)
    fitting = [
        group["groupName"]
        for group in GROUPS
        if all(offered(group).get(name, 0) >= amount for name, amount in need.bundle.items())
    ]
    assert len(fitting) == 1, waits_for(need, [offered(group) for group in GROUPS], {})


def test_engines_and_rays_workers_have_ports_apart() -> None:
    assert CONFIG.manager.ray.port_min > RAY_PORT_MAX
    params = [group["rayStartParams"] for group in GROUPS]
    assert not any("max-worker-port" in one for one in params)


def test_all_run_one_image_and_the_token_is_the_clusters() -> None:
    pods = [CLUSTER["headGroupSpec"], *GROUPS]
    ours = containers("StatefulSet")
    theirs = [pod["template"]["spec"]["containers"][0] for pod in pods]
    assert len({container["image"] for container in (*theirs, *ours.values())}) == 1
    token = next(e for e in ours["manager"]["env"] if e["name"] == "RAY_AUTH_TOKEN")
    reference = token["valueFrom"]["secretKeyRef"]
    assert reference == {"name": CLUSTER["authOptions"]["secretName"], "key": "auth_token"}
    assert CONFIG.manager.ray.auth == CLUSTER["authOptions"]["mode"]


def test_names_lead_where_something_listens() -> None:
    service = documents()["Service"]
    name = service["metadata"]["name"]
    ports = {port["port"] for port in service["spec"]["ports"]}
    assert CONFIG.offline.work_url == f"http://{name}:{CONFIG.offline.port}"
    assert {CONFIG.proxy.port, CONFIG.offline.port} == ports
    head = documents()["RayCluster"]["metadata"]["name"]
    assert CONFIG.manager.ray.address == f"ray://{head}-head-svc:10001"
    ours = containers("StatefulSet").values()
    assert {p["containerPort"] for one in ours for p in one.get("ports", ())} == ports


@pytest.mark.parametrize("name", ["manager", "offline", "proxy"])
def test_commands_are_ones_that_the_program_takes(name: str) -> None:
    command = containers("StatefulSet")[name]["command"]
    assert command[:2] == ["doherty", name]
    shown = subprocess.run(
        [sys.executable, "-m", "backends.cli", *command[1:], "--help"],
        capture_output=True,
        check=True,
        cwd=FOLDER.parents[1],
    ).stdout.decode()
    flags = {word.partition("=")[0] for word in command if word.startswith("--")}
    assert {flag for flag in flags if flag not in shown} == set()
