"""`deploy/compose.yaml` as Compose reads it: what each service may do, and what it is told."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import load_config
from tests.fakes.compose_stack import FILE, plugin
from tests.fakes.programs import ROOT

FOLDER = FILE.parent
PROFILES = ("simulator", "vllm", "sglang", "multi-region", "simulator,alertmanager")
COMMON = {"keys", "pod", "grafana"}
MINUTE_NS = 60_000_000_000

pytestmark = pytest.mark.skipif(
    plugin() is None,
    reason="Docker's Compose plug-in is missing (deploy/compose_plugin.sh FOLDER)",
)


@cache
def read(profiles: str | None) -> dict[str, Any]:
    """Return the file as Compose takes it, with these profiles; None: as `.env` says."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DOHERTY_", "COMPOSE_"))}
    chosen = {} if profiles is None else {"COMPOSE_PROFILES": profiles}
    argv = [plugin() or "", "--file", str(FILE), "config", "--format", "json"]
    told = subprocess.run(argv, env=kept | chosen, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def services() -> dict[str, dict[str, Any]]:
    """Return all of them, whatever their profile."""
    return {k: v for profiles in PROFILES for k, v in read(profiles)["services"].items()}


NAMES = (
    *("alertmanager", "grafana", "keys", "manager", "manager-eu", "manager-sglang", "manager-us"),
    *("manager-vllm", "offline", "pod", "pod-us", "prometheus"),
    *("prometheus-regions", "proxy", "proxy-eu", "proxy-us"),
)


def test_all_services_are_looked_at() -> None:
    assert tuple(sorted(services())) == NAMES


@pytest.mark.parametrize(
    ("profiles", "wanted"),
    [
        (None, {"proxy", "offline", "manager"}),
        ("simulator", {"proxy", "offline", "manager"}),
        ("vllm", {"proxy", "offline", "manager-vllm"}),
        ("sglang", {"proxy", "offline", "manager-sglang"}),
        (
            "multi-region",
            {"proxy-eu", "manager-eu", "pod-us", "proxy-us", "manager-us", "prometheus-regions"},
        ),
        ("simulator,alertmanager", {"proxy", "offline", "manager", "alertmanager"}),
    ],
)
def test_each_profile_is_one_fleet_and_who_watches_it(
    profiles: str | None, wanted: set[str]
) -> None:
    watches = set() if profiles == "multi-region" else {"prometheus"}
    assert set(read(profiles)["services"]) == COMMON | watches | wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_service_may_do_little(name: str) -> None:
    service = services()[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert int(service["mem_limit"]) > 0
    assert 0 < service["pids_limit"] <= 16384
    assert service["restart"] == ("no" if name == "keys" else "unless-stopped")
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
    assert re.search(r":v?\d+\.\d+", service["image"]), "an image is pinned"
    assert not any(v.get("source", "").endswith("docker.sock") for v in service.get("volumes", ()))


@pytest.mark.parametrize("name", NAMES)
def test_no_environment_and_no_command_line_holds_a_key(name: str) -> None:
    service = services()[name]
    for variable in service.get("environment") or {}:
        if re.search(r"KEY|TOKEN|PASSW|SECRET", variable):
            assert variable.endswith(("_FILE", "_PATH")), variable
    command = " ".join(service.get("command") or ())
    assert not re.search(r"--(\w+-)*(key|password)\b", command)


def test_everything_is_published_on_loopback_and_no_engine_is() -> None:
    for name, service in services().items():
        ports = service.get("ports", [])
        assert all(port["host_ip"] == "127.0.0.1" for port in ports)
        assert bool(ports) == (name in {"pod", "pod-us", "grafana"})
        if name.startswith(("manager", "proxy", "offline")):
            assert service["network_mode"].startswith("service:pod")


def test_only_engines_have_gpus() -> None:
    for name, service in services().items():
        reservations = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        devices = [(d["driver"], d["capabilities"]) for d in reservations.get("devices", ())]
        wanted = [("nvidia", ["gpu"])] if name in {"manager-vllm", "manager-sglang"} else []
        assert devices == wanted, name
    assert services()["manager-vllm"]["build"]["args"]["ENGINE_BASE"].startswith("vllm/")
    assert services()["manager-sglang"]["build"]["args"]["ENGINE_BASE"].startswith("lmsysorg/")


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("proxy", "manager", "off"))])
def test_what_serves_is_looked_at_and_has_time_to_end(name: str) -> None:
    service = services()[name]
    assert service["healthcheck"]["test"][0] == "CMD", "no shell"
    files = {"proxy-eu": "eu", "manager-eu": "eu", "proxy-us": "us", "manager-us": "us"}
    config = load_config(str(FOLDER / "compose" / f"{files.get(name, 'doherty')}.yaml"))
    told = service["environment"]["DOHERTY_CONFIG"]
    assert (FOLDER / "compose" / Path(told).name).is_file()
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", service["stop_grace_period"]).groups()  # type: ignore[union-attr]
    longest_s = 60 * int(minutes) + int(seconds)
    if name.startswith("proxy"):
        assert longest_s > config.proxy.shutdown_grace_period_secs + config.proxy.drain_settle_secs
    else:
        assert longest_s > max(p.stop_grace_secs for m in config.models for p in m.pools)


def test_every_mounted_file_is_there() -> None:
    for service in services().values():
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume["source"]
                assert volume["read_only"] is True


def test_env_lists_every_variable_with_its_default() -> None:
    used = dict(re.findall(r"\$\{(DOHERTY_\w+):-([^}]*)\}", FILE.read_text()))
    listed = dict(re.findall(r"^#(DOHERTY_\w+)=(.*)$", (FOLDER / ".env").read_text(), re.MULTILINE))
    for_builds = {"DOHERTY_BUILD_NETWORK", "DOHERTY_TRANSLATE", "DOHERTY_US_PORT"}
    for_builds |= {"DOHERTY_US_ADMIN_PORT"}
    assert set(listed) == set(used) - for_builds
    one_of_several = {"DOHERTY_CONFIG_FILE", "DOHERTY_INTERNAL_KEY_FILE"}
    assert {name for name in listed if listed[name] != used[name]} <= one_of_several


@pytest.mark.parametrize("name", ["doherty", "vllm", "sglang", "eu", "us"])
def test_configurations_are_valid(name: str) -> None:
    path = FOLDER / "compose" / f"{name}.yaml"
    argv = [sys.executable, "-m", "backends.cli", "check", str(path)]
    told = subprocess.run(argv, capture_output=True, cwd=ROOT, check=False)
    assert told.returncode == 0, told.stderr.decode()
    proxy = load_config(str(path)).proxy
    assert (proxy.host, proxy.admin_host) == ("0.0.0.0", "0.0.0.0")
    assert (proxy.port, proxy.admin_port) == (8000, 8001)


def test_the_regions_name_each_other_where_they_listen() -> None:
    hosts = {"eu": "pod", "us": "pod-us"}
    for name, other in (("eu", "us"), ("us", "eu")):
        config = load_config(str(FOLDER / "compose" / f"{name}.yaml"))
        assert config.region == name
        (remote,) = config.remote_regions
        assert (remote.region, remote.url) == (other, f"http://{hosts[other]}:8000")
        assert remote.peer == f"{hosts[other]}:8004"
        assert config.proxy.peer_listen == "0.0.0.0:8004"


def test_prometheus_is_told_what_every_prometheus_is_and_the_key() -> None:
    ours = yaml.safe_load((FOLDER / "compose" / "prometheus.yml").read_text())
    theirs = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text())
    without_key = copy.deepcopy(ours)
    proxy = without_key["scrape_configs"][0]
    assert proxy.pop("authorization") == {"credentials_file": "/keys/admin_api_key"}
    assert without_key == theirs


def test_with_two_regions_what_is_scraped_is_there_and_the_rest_as_ever() -> None:
    """A target that nobody serves would be an alert that never ends."""
    ours = yaml.safe_load((FOLDER / "compose" / "prometheus-regions.yml").read_text())
    usual = yaml.safe_load((FOLDER / "compose" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in ours.pop("scrape_configs")}
    known = {job["job_name"]: job for job in usual.pop("scrape_configs")}
    assert ours == usual
    assert known.keys() - jobs.keys() == {"doherty-offline"}
    assert not any("offline" in name for name in read("multi-region")["services"])
    (proxies,) = jobs["doherty-proxy"].pop("static_configs")
    del known["doherty-proxy"]["static_configs"]
    assert proxies == {"targets": ["127.0.0.1:8001", "pod-us:8001"]}  # it shares the pod of eu
    assert jobs == {name: known[name] for name in jobs}
    (config,) = [
        volume["source"]
        for volume in services()["prometheus-regions"]["volumes"]
        if volume["target"] == "/etc/prometheus/prometheus.yml"
    ]
    assert Path(config).name == "prometheus-regions.yml"


def test_dockerfile_takes_nothing_but_sources_into_an_image() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    taken = {rule[1:] for rule in rules if rule.startswith("!")}
    assert taken == {"LICENSE", "README.md", "pyproject.toml", "backends", "loadtest", "proxy"}


def test_keys_are_drawn_once(tmp_path: Path) -> None:
    script = FOLDER / "compose" / "draw_keys.py"

    def draw() -> str:
        argv = [sys.executable, str(script), str(tmp_path)]
        return subprocess.run(argv, capture_output=True, check=True).stdout.decode()

    (tmp_path / "peer_key").write_text("ours")
    assert draw().split() == (
        ["drawn:", "admin_api_key", "internal_key", "work_key", "grafana_admin_password"]
    )
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn.pop("peer_key") == "ours"
    assert len(set(drawn.values())) == 4
    assert all(len(key) >= 32 for key in drawn.values())
    assert (tmp_path / "admin_api_key").stat().st_mode & 0o777 == 0o440
    assert "nothing" in draw()
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.name != "peer_key"} == drawn


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    grafana = services()["grafana"]
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "$PROMETHEUS_URL"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://pod:9090"
    assert any(port["target"] == 9090 for port in services()["pod"]["ports"])
    targets = {v["source"]: v["target"] for v in grafana["volumes"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "doherty.yaml").read_text())[
        "providers"
    ]
    assert targets[str(FOLDER / "grafana" / "dashboards")] == provider["options"]["path"]
