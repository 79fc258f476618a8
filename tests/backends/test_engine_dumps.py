"""What a pool with `snapshot: true` changes in an engine's command, and the hook in its Python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from backends.engines import ENGINES
from backends.engines.base import FlagError, Launch, Ports, merged
from backends.engines.dumps import HOOK
from backends.engines.release import UNKNOWN_RELEASE
from backends.spec import ReplicaSpec

SPEC = ReplicaSpec(
    replica_id="m-0", model="m", pool="m", engine="vllm", model_path="/models/m", snapshot=True
)
DRAFT = {"vllm": ("--speculative-config", "{}"), "sglang": ("--speculative-algorithm", "EAGLE3")}


def spec_of(engine: str, *args: str, **changed: object) -> ReplicaSpec:
    return msgspec.structs.replace(SPEC, engine=engine, args=args, **changed)


def launch_of(spec: ReplicaSpec) -> Launch:
    return ENGINES[spec.engine].command(spec, Ports(1), UNKNOWN_RELEASE)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_may_be_dumped_has_no_compilers_and_no_infiniband(engine: str) -> None:
    launch = launch_of(spec_of(engine))
    assert launch.env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert launch.env["NCCL_IB_DISABLE"] == "1"
    assert launch.python_path == HOOK
    assert "NCCL_IB_DISABLE" not in launch_of(spec_of(engine, snapshot=False)).env


def test_the_hook_comes_before_what_the_path_says() -> None:
    launch = launch_of(SPEC)
    assert merged({}, launch, SPEC)["PYTHONPATH"] == HOOK
    own = msgspec.structs.replace(SPEC, env={"PYTHONPATH": "/own"})
    assert merged({"PYTHONPATH": "/ours"}, launch, own)["PYTHONPATH"] == f"{HOOK}{os.pathsep}/own"


def test_vllm_drops_its_weights_where_it_can_read_them_again() -> None:
    vllm = ENGINES["vllm"]
    assert "--enable-sleep-mode" in launch_of(SPEC).argv
    assert launch_of(SPEC).env["VLLM_SERVER_DEV_MODE"] == "1"
    assert vllm.dump_level(SPEC) == 2
    for spec in (
        spec_of("vllm", "--load-format", "dummy"),
        spec_of("vllm", *DRAFT["vllm"]),
        spec_of("vllm", adapters={"a": "/a"}),
    ):
        assert vllm.dump_level(spec) == 1
        assert vllm.sleep_calls(spec, 1)


def test_sglang_copies_no_weights_for_an_image_alone() -> None:
    sglang = ENGINES["sglang"]
    alone = spec_of("sglang")
    argv = launch_of(alone).argv
    assert "--enable-memory-saver" in argv
    assert "--enable-weights-cpu-backup" not in argv
    assert sglang.dump_level(alone) == 2
    paths = [call.path for call in sglang.wake_calls(alone, 2)]
    assert paths[:3] == [
        "/resume_memory_occupation",
        "/update_weights_from_disk",
        "/continue_generation",
    ]
    assert sglang.wake_calls(alone, 2)[1].body == b'{"model_path":"/models/m"}'
    with pytest.raises(FlagError, match="take 2"):
        sglang.sleep_calls(alone, 1)
    balked = sglang.balk_calls(alone, 2, 0)
    assert balked is not None
    assert "/update_weights_from_disk" not in [call.path for call in balked]


@pytest.mark.parametrize(
    "spec",
    [
        spec_of("sglang", sleep=True),
        spec_of("sglang", "--load-format", "dummy"),
        spec_of("sglang", *DRAFT["sglang"]),
        spec_of("sglang", adapters={"a": "/a"}),
    ],
    ids=["sleep", "dummy", "draft", "adapters"],
)
def test_sglang_copies_what_it_could_not_read_again(spec: ReplicaSpec) -> None:
    assert "--enable-weights-cpu-backup" in launch_of(spec).argv
    assert ENGINES["sglang"].dump_level(spec) == 1
    assert ENGINES["sglang"].sleep_calls(spec, 1)


NVML = """
#include <stdio.h>
static int users = 3;
int nvmlShutdown(void) { if (!users) return 1; printf("%d\\n", --users); fflush(stdout); return 0; }
"""
PROGRAM = """
import builtins, signal
print(builtins.hidden, flush=True)
signal.sigwait([signal.SIGUSR1])
"""


def test_the_hook_shuts_nvml_down_and_hides_no_other(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for an NVML that is not there")
    source = tmp_path / "nvml.c"
    source.write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.hidden = 'run'\n")
    program = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])" + PROGRAM
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{HOOK}:{tmp_path}", "LD_LIBRARY_PATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "run\n"
        process.send_signal(signal.SIGUSR2)
        assert [process.stdout.readline() for _ in range(3)] == ["2\n", "1\n", "0\n"]
        process.send_signal(signal.SIGUSR1)
        assert process.wait(10) == 0
