"""What a replica's container is to be, as the body of one request to the Docker engine.

**Network: the host's.** Engines listen on loopback, at ports that the manager has leased, and their
KV events come from there too; ranks of one engine find each other by addresses of the machine. All
this holds in a container only with the host's network; a published port would be a second name for
every address, and a process that copies octets. What a container then still gives is the image: the
engine's own libraries beside those of others.

**Files.** A path that the command names and that exists on this machine (weights, an adapter, a
chat template) is mounted at the same place, and nothing can be written there. What the engine
compiles goes to `cache_dir`, which outlives the container: without it every start would be a cold
one. Further folders are the operator's to name, also those of adapters that are loaded later.

**GPUs.** Those of the lease and no others. In the container they are numbered from 0, so the
lease's own numbering is taken out of the environment. A command that counts cards itself sees all.

**Labels** say whose it is: anyone who may talk to the engine can read them, so they hold ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from backends.gpus import DEVICE_LIST, FIRST_DEVICE, ORDER, VISIBLE
from backends.journal import Launch
from backends.providers.base import LAUNCH_ID_VARIABLE
from proxy.config import DockerConfig

RUN_FOLDER_LABEL = "doherty.run-folder"
LAUNCH_LABEL = "doherty.launch"
REPLICA_LABEL = "doherty.replica"
BOOT_LABEL = "doherty.boot"

# What Docker keeps of the output for `docker logs`; ours is in the replica's log file.
_LOG = {"Type": "json-file", "Config": {"max-size": "16m", "max-file": "2"}}
# Folders whose content belongs to the image: a path there that exists here as well is another one.
_IMAGES_OWN = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
    "/var/run",
)
_BINDING = ("--cpunodebind=", "--preferred=")


class Machine(msgspec.Struct, frozen=True):
    """What must be asked of this machine."""

    boot_id: str
    run_folder: str
    exists: Callable[[str], bool]
    cpus_of: Callable[[str], str]  # those of a NUMA node, as a list such as 0-7,16-23


def name_of(launch_id: str) -> str:
    """Return the container's name: two of one launch cannot be, whatever was asked twice."""
    return f"doherty-{launch_id}"


def container_of(
    launch: Launch,
    argv: Sequence[str],
    env: Mapping[str, str],
    config: DockerConfig,
    machine: Machine,
) -> dict[str, Any]:
    """Return the body of the request that creates the container of `launch`."""
    node, argv = _unbound(argv)
    host: dict[str, Any] = {
        "NetworkMode": "host",
        "Init": True,  # it reaps what engines leave behind, and passes SIGTERM on
        "ShmSize": config.shm_mib * 1024**2,  # ranks exchange tensors there
        "Mounts": [*_mounts(argv, config, machine)],  # unlike Binds, it makes no missing folder
        "LogConfig": _LOG,
        "RestartPolicy": {"Name": "no"},  # who is started again is for the manager to say
        # RDMA locks the memory that it sends from; without cards nothing is sent.
        "Ulimits": [{"Name": "memlock", "Soft": -1, "Hard": -1}] if launch.gpus else [],
        "DeviceRequests": _devices(launch.gpus, argv),
    }
    if node:
        host["CpusetCpus"] = machine.cpus_of(node)  # its memory follows: the first touch is there
    kept = {k: v for k, v in env.items() if not launch.gpus or k not in {VISIBLE, *ORDER}}
    body: dict[str, Any] = {
        "Image": launch.image,
        "Entrypoint": list(argv),
        "Cmd": [],
        "Env": [f"{k}={v}" for k, v in {**kept, LAUNCH_ID_VARIABLE: launch.launch_id}.items()],
        "Labels": {
            RUN_FOLDER_LABEL: machine.run_folder,
            LAUNCH_LABEL: launch.launch_id,
            REPLICA_LABEL: launch.replica_id,
            BOOT_LABEL: machine.boot_id,
        },
        "HostConfig": host,
    }
    if config.user is not None:
        body["User"] = config.user
    return body


def cache_environment(cache_dir: str) -> dict[str, str]:
    """Return what has engines keep what they compile and fetch in `cache_dir`."""
    folders = {
        "HF_HOME": "huggingface",
        "VLLM_CACHE_ROOT": "vllm",
        "SGLANG_CACHE_DIR": "sglang",
        "SGLANG_DG_CACHE_DIR": "deep_gemm",
        "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
        "TRITON_CACHE_DIR": "triton",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
        "CUDA_CACHE_PATH": "cuda",
    }
    return {variable: f"{cache_dir}/{folder}" for variable, folder in folders.items()}


def tag_of(image: str) -> str:
    """Return the tag of an image's name; empty when it has none."""
    last = image.partition("@")[0].rpartition("/")[2]
    return last.partition(":")[2]


def _unbound(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the NUMA node to which a command is bound, and the command without that."""
    count = len(_BINDING) + 1
    if argv[0] != "numactl" or not all(map(str.startswith, argv[1:count], _BINDING)):
        return "", argv
    return argv[1].partition("=")[2], argv[count:]


def _devices(gpus: Sequence[str], argv: Sequence[str]) -> list[dict[str, Any]]:
    if not gpus:
        return []
    counts_itself = any(a.partition("=")[0] in {DEVICE_LIST, FIRST_DEVICE} for a in argv)
    which = {"Count": -1} if counts_itself else {"DeviceIDs": list(gpus)}
    return [{"Driver": "nvidia", "Capabilities": [["gpu"]], **which}]


def _mounts(
    argv: Sequence[str], config: DockerConfig, machine: Machine
) -> Iterator[dict[str, Any]]:
    assert config.cache_dir is not None
    yield _mount(config.cache_dir, config.cache_dir)
    named = {}
    for text in config.mounts:
        path, *rest = text.split(":")
        read_only = rest[-1:] == ["ro"]
        inside = next((part for part in rest if part.startswith("/")), path)
        named[path] = _mount(path, inside, read_only=read_only)
    yield from named.values()
    for path in dict.fromkeys(_paths(argv[1:])):
        if path not in named and machine.exists(path):
            yield _mount(path, path, read_only=True)


def _mount(source: str, target: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}


def _paths(words: Sequence[str]) -> Iterator[str]:
    """Yield the paths that a command names: alone, after `--flag=`, or after an adapter's name."""
    for word in words:
        path = word if word.startswith("/") else word.partition("=")[2]
        plain = path.rstrip("/")
        inner = any(plain == own or plain.startswith(own + "/") for own in _IMAGES_OWN)
        if path.startswith("/") and plain and not inner:
            yield plain
