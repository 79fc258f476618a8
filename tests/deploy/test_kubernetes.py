"""The files for Kubernetes: as its API takes them, of one mind, and Doherty takes its part."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from backends.cli import main
from backends.engines import ENGINES
from backends.providers.ray_words import Need, waits_for
from backends.spec import pool_specs
from backends.starting import gpus_wanted
from proxy.config import load_config

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
RELEASES = ("1.30", "1.34")
RAY_PORT_MAX = 19_999  # of Ray's workers where nobody says otherwise (ray start --help)
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
FOREIGN = {"RayCluster", "PodMonitor"}  # of others' operators: no schema of Kubernetes' own


def documents() -> list[dict[str, Any]]:
    names = [path.name for path in sorted(FOLDER.glob("*.yaml"))]
    plain = {"kustomization.yaml", "doherty.yaml"}
    texts = [(FOLDER / name).read_text() for name in names if name not in plain]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents() if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


CONFIG = load_config(str(FOLDER / "doherty.yaml"))
CLUSTER = named("RayCluster", "doherty")["spec"]
GROUPS = CLUSTER["workerGroupSpecs"]
PODS = (("Deployment", "doherty-proxy"), ("StatefulSet", "doherty-manager"))
COMMANDS = ("proxy", "manager", "offline")


def pod(kind: str, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = named(kind, name)["spec"]["template"]["spec"]
    return spec


def containers() -> dict[str, dict[str, Any]]:
    return {c["name"]: c for kind, name in PODS for c in pod(kind, name)["containers"]}


def offered(group: dict[str, Any]) -> dict[str, float]:
    """Return what a node of the group has, as Ray counts it."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    own = json.loads(json.loads(group["rayStartParams"]["resources"]))
    return {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])} | own


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_takes_them(release: str) -> None:
    ours = [document for document in documents() if document["kind"] not in FOREIGN]
    assert len(ours) == 10
    for document in ours:
        kubernetes_validate.validate(document, release, strict=True)


def test_the_pods_of_a_ray_cluster_are_pods() -> None:
    for group in (CLUSTER["headGroupSpec"], *GROUPS):
        template = {"metadata": {"name": "x"}, **group["template"]}
        whole = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(whole, RELEASES[-1], strict=True)


def test_kustomize_takes_every_file_and_names_every_image() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")}
    (made,) = KUSTOMIZATION["configMapGenerator"]
    left_out = {"kustomization.yaml", "podmonitor.yaml"}
    assert {*KUSTOMIZATION["resources"], *made["files"]} == files - left_out
    used = {
        image for d in documents() for image in re.findall(r'"image": "([^"]+)"', json.dumps(d))
    }
    assert {entry["name"] for entry in KUSTOMIZATION["images"]} == used
    mounts = [pod(*which)["volumes"][0] for which in PODS]
    assert [mount["configMap"]["name"] for mount in mounts] == [made["name"]] * 2


def test_doherty_takes_its_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOHERTY_WORK_KEY", "of the secret")
    assert main(["check", str(FOLDER / "doherty.yaml")]) == 0
    assert "doherty.yaml: ok" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_container_may_do_little(name: str) -> None:
    """As the profile `restricted` of the Pod Security Standards has it, and a root that stays."""
    container = containers()[name]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert "readinessProbe" in container


@pytest.mark.parametrize(("kind", "name"), PODS)
def test_a_pod_is_nobodys_and_holds_no_token(kind: str, name: str) -> None:
    spec = pod(kind, name)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    # A service named doherty would set DOHERTY_PORT to tcp://…, which is a setting of ours.
    assert spec["enableServiceLinks"] is False


def test_a_proxy_that_goes_has_time_to_finish() -> None:
    proxy = CONFIG.proxy
    longest_s = proxy.drain_settle_secs + proxy.shutdown_grace_period_secs
    assert proxy.drain_settle_secs > 0, "endpoints take a moment to be told"
    assert pod(*PODS[0])["terminationGracePeriodSeconds"] > longest_s
    rolling = named(*PODS[0])["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


def test_keys_are_files_of_one_secret() -> None:
    for name in COMMANDS:
        for variable in containers()[name]["env"]:
            if variable["name"].startswith("DOHERTY_"):
                assert variable["name"].endswith("_KEY_FILE")
                assert variable["value"].startswith("/keys/")
            else:  # Ray's own
                assert "value" not in variable
    for which in PODS:
        assert {"name": "keys", "secret": {"secretName": "doherty-keys", "defaultMode": 0o440}} in (
            pod(*which)["volumes"]
        )


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


def test_engines_and_manager_run_one_image_and_the_token_is_the_clusters() -> None:
    pods = [CLUSTER["headGroupSpec"], *GROUPS]
    theirs = [one["template"]["spec"]["containers"][0] for one in pods]
    ours = [containers()[name] for name in ("manager", "offline")]
    assert len({container["image"] for container in (*theirs, *ours)}) == 1
    (token,) = [e for e in containers()["manager"]["env"] if e["name"] == "RAY_AUTH_TOKEN"]
    reference = token["valueFrom"]["secretKeyRef"]
    assert reference == {"name": CLUSTER["authOptions"]["secretName"], "key": "auth_token"}
    assert CONFIG.manager.ray.auth == CLUSTER["authOptions"]["mode"]


def test_names_lead_where_something_listens() -> None:
    def ports(service: str) -> set[int]:
        return {port["port"] for port in named("Service", service)["spec"]["ports"]}

    proxy, manager, offline = CONFIG.proxy, CONFIG.manager, CONFIG.offline
    assert ports("doherty") == {proxy.port}
    assert ports("doherty-manager") == {manager.port, offline.port}
    listening = (proxy.peer_listen or "").rpartition(":")[2]
    assert ports("doherty-peers") == {int(listening)}
    assert proxy.peers == (f"dns:doherty-peers:{listening}",)
    assert named("Service", "doherty-peers")["spec"]["clusterIP"] == "None"
    assert proxy.manager_url == f"http://doherty-manager:{manager.port}"
    assert proxy.offline_url == offline.work_url == f"http://doherty-manager:{offline.port}"
    assert manager.ray.address == "ray://doherty-head-svc:10001"
    opened = {p["containerPort"] for one in containers().values() for p in one["ports"]}
    assert opened == {int(listening), proxy.port, proxy.admin_port, manager.port, offline.port}


def test_every_selector_finds_its_pods() -> None:
    labels = [named(*which)["spec"]["template"]["metadata"]["labels"] for which in PODS]
    labels.append({"ray.io/cluster": named("RayCluster", "doherty")["metadata"]["name"]})
    selectors = [
        found
        for document in documents()
        if document["kind"] in {"Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"}
        for found in (document["spec"].get("selector") or document["spec"]["podSelector"],)
    ]
    assert len(selectors) == 9
    for selector in selectors:
        wanted = selector.get("matchLabels", selector)
        assert sum(wanted.items() <= has.items() for has in labels) == 1, selector


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_ones_that_the_program_takes(name: str) -> None:
    args = containers()[name]["args"]
    assert args[0] == name
    shown = subprocess.run(
        [sys.executable, "-m", "backends.cli", *args, "--help"],
        capture_output=True,
        check=True,
        cwd=FOLDER.parents[1],
    ).stdout.decode()
    flags = {word.partition("=")[0] for word in args if word.startswith("--")}
    assert {flag for flag in flags if flag not in shown} == set()
