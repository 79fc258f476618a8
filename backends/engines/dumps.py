"""What an engine's processes need so that they can be dumped, and an image of them be small.

They may have no pool of compilers at work, no connection to anything, and no device open when they
are dumped. These variables are those of NVIDIA's own snapshots of vLLM and SGLang (Dynamo) and of
Modal's: `TORCHINDUCTOR_COMPILE_THREADS` keeps torch from having compilers wait in processes of
their own, the rest keeps NCCL and what watches it from opening sockets and InfiniBand devices that
one card does not need. `HOOK` is a folder for PYTHONPATH, for every start of an engine in Python:
it lets go of devices, and tells what was read, when it is asked to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from backends.engines.base import option

HOOK = str(Path(__file__).resolve().parents[1] / "snapshots" / "hook")
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_RAS_ENABLE": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        # A cell has loopback and a link to this machine: engines look for the way to the internet
        # to learn their own address, and SGLang raises where it finds none and is not told.
        "VLLM_HOST_IP": "127.0.0.1",
        "SGLANG_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
)


def reads_weights(args: Sequence[str]) -> bool:
    """Say whether the weights are those of files, which can be read again."""
    return option(args, "--load-format") != "dummy"
