"""What is asked of the Docker engine for a replica, and how its answers are read."""

from __future__ import annotations

from typing import Any

import pytest
from aiodocker import DockerError

from backends.journal import Launch
from backends.providers.container import describe_end, stamped
from backends.providers.container_form import Machine, cache_environment, container_of, tag_of
from backends.providers.docker import checkpoint_capability, explain
from proxy.config import DockerConfig

MACHINE = Machine("boot", "/run/doherty", lambda path: path.startswith("/data"), lambda n: f"{n}-7")
CONFIG = DockerConfig(cache_dir="/run/doherty/cache")


def body_of(
    *argv: str,
    env: dict[str, str] | None = None,
    gpus: tuple[str, ...] = (),
    config: DockerConfig = CONFIG,
) -> dict[str, Any]:
    launch = Launch(
        launch_id="a1",
        replica_id="m-0",
        launch_hash="h",
        engine="vllm",
        model="m",
        pool="p",
        port=7000,
        stop_grace_s=1.0,
        starts=1,
        at_s=0.0,
        gpus=gpus,
        image="vllm:v0.30.1",
    )
    return container_of(launch, argv or ("vllm", "serve"), env or {}, config, MACHINE)


def mounts_of(body: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    return {m["Source"]: (m["Target"], m["ReadOnly"]) for m in body["HostConfig"]["Mounts"]}


def test_the_command_takes_the_place_of_the_images_own() -> None:
    body = body_of("vllm", "serve", "--port", "7000", env={"HF_TOKEN": "hf_secret"})
    assert body["Entrypoint"] == ["vllm", "serve", "--port", "7000"]
    assert body["Cmd"] == []
    assert body["Image"] == "vllm:v0.30.1"
    assert body["HostConfig"]["NetworkMode"] == "host"
    assert body["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    assert {"HF_TOKEN=hf_secret", "DOHERTY_LAUNCH_ID=a1"} == set(body["Env"])


def test_labels_say_whose_it_is_and_hold_no_secret() -> None:
    labels = body_of("vllm", "--api-key", "k3y", env={"HF_TOKEN": "hf_secret"})["Labels"]
    assert labels == {
        "doherty.run-folder": "/run/doherty",
        "doherty.launch": "a1",
        "doherty.replica": "m-0",
        "doherty.boot": "boot",
    }


def test_paths_of_the_command_are_mounted_read_only() -> None:
    body = body_of(
        *("vllm", "/data/model/", "--chat-template=/data/chat.jinja", "--lora-modules"),
        *(
            "a=/data/lora",
            "--served",
            "/nowhere",
            "/usr/lib/x",
            "--url=http://data/",
            "/data/model",
        ),
    )
    assert mounts_of(body) == {
        "/run/doherty/cache": ("/run/doherty/cache", False),
        "/data/model": ("/data/model", True),
        "/data/chat.jinja": ("/data/chat.jinja", True),
        "/data/lora": ("/data/lora", True),
    }


def test_mounts_of_the_configuration_are_kept_and_come_before_those_of_the_command() -> None:
    mounts = ("/data/model:/models:ro", "/scratch", "/hub:ro", "/w:/v:rw")
    config = DockerConfig(cache_dir="/c", mounts=mounts, user="1000:1000", shm_mib=64)
    body = body_of("vllm", "/data/model", config=config)
    assert mounts_of(body) == {
        "/c": ("/c", False),
        "/data/model": ("/models", True),
        "/scratch": ("/scratch", False),
        "/hub": ("/hub", True),
        "/w": ("/v", False),
    }
    assert body["User"] == "1000:1000"
    assert body["HostConfig"]["ShmSize"] == 64 * 1024**2


def test_a_container_has_the_cards_of_its_lease_and_counts_them_from_0() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "4,5", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "A": "1"}
    body = body_of("vllm", env=env, gpus=("4", "5"))
    (request,) = body["HostConfig"]["DeviceRequests"]
    assert request == {"Driver": "nvidia", "Capabilities": [["gpu"]], "DeviceIDs": ["4", "5"]}
    assert body["Env"] == ["A=1", "DOHERTY_LAUNCH_ID=a1"]


def test_a_command_that_counts_cards_itself_sees_all_of_them() -> None:
    (request,) = body_of("sglang", "--base-gpu-id", "2", gpus=("2",))["HostConfig"][
        "DeviceRequests"
    ]
    assert request == {"Driver": "nvidia", "Capabilities": [["gpu"]], "Count": -1}


def test_without_cards_nothing_is_asked_of_the_toolkit_or_of_limits() -> None:
    host = body_of("vllm", env={"CUDA_VISIBLE_DEVICES": ""})["HostConfig"]
    assert host["DeviceRequests"] == []
    assert host["Ulimits"] == []


def test_a_binding_to_a_node_becomes_the_containers() -> None:
    body = body_of("numactl", "--cpunodebind=1", "--preferred=1", "vllm", "serve", gpus=("0",))
    assert body["Entrypoint"] == ["vllm", "serve"]
    assert body["HostConfig"]["CpusetCpus"] == "1-7"


def test_each_cache_has_a_folder_of_its_own() -> None:
    folders = cache_environment("/c").values()
    assert len(set(folders)) == len(folders)
    assert all(folder.startswith("/c/") for folder in folders)


@pytest.mark.parametrize(
    ("image", "tag"),
    [
        ("vllm/vllm-openai:v0.26.0", "v0.26.0"),
        ("registry:5000/vllm", ""),
        ("registry:5000/a/b:1.2@sha256:0f", "1.2"),
        ("vllm", ""),
    ],
)
def test_the_tag_of_an_image(image: str, tag: str) -> None:
    assert tag_of(image) == tag


@pytest.mark.parametrize(
    ("state", "how"),
    [
        ({"ExitCode": 0}, "exited with status 0"),
        ({"ExitCode": 3}, "exited with status 3"),
        ({"ExitCode": 137}, "killed by SIGKILL"),
        ({"ExitCode": 143}, "killed by SIGTERM"),
        (
            {"ExitCode": 137, "OOMKilled": True},
            "killed by SIGKILL: its container had no memory left",
        ),
        ({"ExitCode": 127, "Error": "no such file"}, "exited with status 127 (no such file)"),
    ],
)
def test_ends_are_told_in_the_words_of_processes(state: dict[str, Any], how: str) -> None:
    assert describe_end(state) == how


def test_lines_come_with_the_time_at_which_docker_took_them() -> None:
    text = "2026-11-26T22:22:58.123456789Z listening\n"
    assert stamped(text) == (1795731778_123456789, "listening\n")
    assert stamped("\ufffd" + text)[1] == "\ufffdlistening\n"  # the end of a letter cut in two
    assert stamped("no stamp\n") == (0, "no stamp\n")


@pytest.mark.parametrize(
    ("status", "message", "advice"),
    [
        (404, "No such image: vllm:v9", "docker pull"),
        (500, 'could not select device driver "nvidia" with capabilities: [[gpu]]', "toolkit"),
        (400, 'exec: "vllm": executable file not found in $PATH', "another image"),
        (900, "Cannot connect", "does not answer"),
        (500, "no space left on device", "no space left on device"),
    ],
)
def test_refusals_say_what_would_help(status: int, message: str, advice: str) -> None:
    assert advice in explain(DockerError(status, message), CONFIG)


def test_why_docker_checkpoint_is_no_rung_is_told() -> None:
    plain, experimental = {}, {"ExperimentalBuild": True}
    for info in (plain, experimental):
        capability = checkpoint_capability(info)
        assert not capability.works
        assert capability.reason
    assert "experimental" in checkpoint_capability(plain).reason
