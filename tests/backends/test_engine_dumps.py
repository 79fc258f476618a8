"""What a pool with `snapshot: true` changes in an engine's command, and the hook in its Python."""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
    assert vllm.sleep_level(SPEC) == 1  # to be quick; an image wants to be small


@pytest.mark.parametrize("sleep", [False, True])
def test_sglang_copies_no_weights_into_an_image(sleep: bool) -> None:
    sglang = ENGINES["sglang"]
    alone = spec_of("sglang", sleep=sleep)
    argv = launch_of(alone).argv
    assert "--enable-memory-saver" in argv
    assert "--enable-weights-cpu-backup" not in argv
    assert sglang.dump_level(alone) == sglang.sleep_level(alone) == 2
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
        spec_of("sglang", sleep=True, snapshot=False),
        spec_of("sglang", "--load-format", "dummy"),
        spec_of("sglang", *DRAFT["sglang"]),
        spec_of("sglang", adapters={"a": "/a"}),
    ],
    ids=["sleep", "dummy", "draft", "adapters"],
)
def test_sglang_copies_what_it_could_not_read_again(spec: ReplicaSpec) -> None:
    assert "--enable-weights-cpu-backup" in launch_of(spec).argv
    assert ENGINES["sglang"].dump_level(spec) == ENGINES["sglang"].sleep_level(spec) == 1
    assert ENGINES["sglang"].sleep_calls(spec, 1)


NVML = """
#include <stdio.h>
static int users = 3;
int nvmlShutdown(void) { if (!users) return 1; printf("%d\\n", --users); fflush(stdout); return 0; }
"""
PROGRAM = """
import builtins, sys
print(builtins.hidden, flush=True)
sys.stdin.read()
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
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{HOOK}:{tmp_path}", "LD_LIBRARY_PATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "run\n"
        process.send_signal(signal.SIGUSR2)
        assert [process.stdout.readline() for _ in range(3)] == ["2\n", "1\n", "0\n"]
        process.communicate()
        assert process.returncode == 0


# --- the weights of vLLM in a file ------------------------------------------------------------


def test_vllm_keeps_its_weights_in_a_file_for_level_2_where_an_image_is_wanted() -> None:
    vllm = ENGINES["vllm"]
    assert "doherty_weights.Weights" in launch_of(SPEC).argv
    assert b"doherty_keep" in vllm.sleep_calls(SPEC, 2)[0].body
    assert b"doherty_fill" in vllm.wake_calls(SPEC, 2)[1].body
    assert vllm.sleep_calls(SPEC, 1)[0].path.startswith("/sleep")
    for spec in (
        spec_of("vllm", snapshot=False, sleep=True),
        spec_of("vllm", "--worker-extension-cls", "own.Extension"),
    ):
        assert "doherty_weights.Weights" not in launch_of(spec).argv
        assert vllm.sleep_calls(spec, 2)[0].path.startswith("/sleep")
        assert vllm.wake_calls(spec, 2)[1].body == b'{"method":"reload_weights"}'


class HostLink:
    """Copies between places of this process's memory, as the card's would be."""

    def __init__(self) -> None:
        self.buffers: list[object] = []
        self.broken = False

    def begin(self) -> None:
        pass

    def buffer(self, size: int) -> tuple[int, memoryview]:
        memory = ctypes.create_string_buffer(size)
        self.buffers.append(memory)
        return ctypes.addressof(memory), memoryview(memory).cast("B")

    def copy(self, target: int, source: int, size: int) -> None:
        if self.broken:
            raise OSError("the card is gone")
        ctypes.memmove(target, source, size)

    def end(self) -> None:
        self.buffers.clear()


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HOOK)
    module = importlib.import_module("doherty_weights")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    return module


def test_weights_come_back_from_a_file_octet_by_octet(weights: ModuleType, tmp_path: Path) -> None:
    draw = random.Random(1)
    memory = [ctypes.create_string_buffer(draw.randbytes(size), size) for size in (5500, 1000, 7)]
    regions = [(ctypes.addressof(one), len(one)) for one in memory]
    before = [one.raw for one in memory]
    path = str(tmp_path / "kept" / "m.weights")
    weights.keep(path, regions, HostLink())
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    for one in memory:
        ctypes.memset(one, 0, len(one))
    weights.fill(path, regions, HostLink())
    assert [one.raw for one in memory] == before
    with pytest.raises(weights.NotHereError, match="of other memory"):
        weights.fill(path, regions[:2], HostLink())
    with pytest.raises(weights.NotHereError):
        weights.fill(str(tmp_path / "none.weights"), regions, HostLink())


def test_half_a_file_of_weights_is_none(weights: ModuleType, tmp_path: Path) -> None:
    memory = ctypes.create_string_buffer(5000)
    regions = [(ctypes.addressof(memory), 5000)]
    broken = HostLink()
    broken.broken = True
    with pytest.raises(OSError, match="gone"):
        weights.keep(str(tmp_path / "m.weights"), regions, broken)
    assert list(tmp_path.iterdir()) == []
    for number in range(weights.FILES_MAX + 2):
        path = tmp_path / f"{number}.weights"
        weights.keep(str(path), regions, HostLink())
        os.utime(path, ns=(number, number))
    assert {one.name for one in tmp_path.iterdir()} == {
        f"{number}.weights" for number in range(2, weights.FILES_MAX + 2)
    }
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="ends too soon"):
        weights.fill(str(path), regions, HostLink())


class FakeVllm:
    """vLLM and torch as a worker sees them, with weights in this process's memory."""

    def __init__(self, weights: ModuleType, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.memory = memory = ctypes.create_string_buffer(b"w" * 3000, 3000)
        self.card = "NVIDIA H200"
        self.reloaded = 0
        data = SimpleNamespace(handle=(0, 3000, 0, 0), tag="weights")
        cache = SimpleNamespace(handle=(0, 9, 0, 0), tag="kv_cache")
        allocator = SimpleNamespace(pointer_to_data={ctypes.addressof(memory): data, 5: cache})
        here = SimpleNamespace(get_instance=lambda: allocator)
        modules: dict[str, dict[str, object]] = {
            "torch": {"cuda": SimpleNamespace(get_device_name=lambda: self.card)},
            "vllm": {"__version__": "1"},
            "vllm.device_allocator": {},
            "vllm.device_allocator.cumem": {"CuMemAllocator": here},
        }
        for name, content in modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.setattr(weights, "CudaLink", HostLink)
        patch.setenv("DOHERTY_WEIGHTS", str(folder / "kept"))
        patch.setenv("DOHERTY_WEIGHTS_FORM", "a")
        fake = self

        class Worker(weights.Weights):  # type: ignore[misc]
            model_config = SimpleNamespace(model=str(folder), dtype="bf16")
            parallel_config = SimpleNamespace(data_parallel_rank=0)
            rank = 0

            def reload_weights(self) -> None:
                fake.reloaded += 1

        self.worker = Worker()


@pytest.fixture
def vllm(weights: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    return FakeVllm(weights, tmp_path, monkeypatch)


def test_a_worker_without_a_file_reloads(vllm: FakeVllm, tmp_path: Path) -> None:
    """Whatever is wrong with the file, or with what is imported for it."""
    worker = vllm.worker
    assert worker.doherty_keep()["kept"] is False  # no folder of weights
    assert worker.doherty_fill()["filled"] is False
    assert vllm.reloaded == 1
    (tmp_path / "model.safetensors").touch()
    assert worker.doherty_keep()["kept"] is True
    assert worker.doherty_keep() == {"kept": True, "took_s": 0.0}
    ctypes.memset(vllm.memory, 0, 3000)
    assert worker.doherty_fill()["filled"] is True
    assert vllm.memory.raw == b"w" * 3000
    (tmp_path / "model.safetensors").write_bytes(b"new")  # another checkpoint
    assert worker.doherty_fill()["filled"] is False
    assert vllm.reloaded == 2


def test_a_worker_takes_no_file_of_another_kind_of_worker(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is at the same addresses and of the same size, and holds something else."""
    worker = vllm.worker
    (tmp_path / "model.safetensors").touch()
    assert worker.doherty_keep()["kept"] is True
    monkeypatch.setattr(worker, "rank", 1)  # of two: the other half of each layer
    assert worker.doherty_fill()["filled"] is False
    monkeypatch.setattr(worker, "rank", 0)
    monkeypatch.setattr(worker.parallel_config, "data_parallel_rank", 1)  # with other experts
    assert worker.doherty_fill()["filled"] is False
    monkeypatch.setattr(worker.parallel_config, "data_parallel_rank", 0)
    monkeypatch.setenv("DOHERTY_WEIGHTS_FORM", "b")  # a flag has them lie in another order
    assert worker.doherty_fill()["filled"] is False
    monkeypatch.setenv("DOHERTY_WEIGHTS_FORM", "a")
    vllm.card = "NVIDIA L4"
    assert worker.doherty_fill()["filled"] is False
    vllm.card = "NVIDIA H200"
    assert worker.doherty_fill()["filled"] is True


def test_two_who_keep_the_same_weights_do_not_write_into_one_file(
    weights: ModuleType, tmp_path: Path
) -> None:
    """In two cells they have the same pid."""
    memory = ctypes.create_string_buffer(b"w" * 3000, 3000)
    regions = [(ctypes.addressof(memory), 3000)]
    path = str(tmp_path / "m.weights")

    class Second(HostLink):
        """While it writes, another keeps the same."""

        first = True

        def copy(self, target: int, source: int, size: int) -> None:
            if self.first:
                self.first = False
                weights.keep(path, regions, HostLink())
            super().copy(target, source, size)

    old = tmp_path / "gone.new"
    old.touch()
    os.utime(old, (0, 0))
    weights.keep(path, regions, Second())
    assert [one.name for one in tmp_path.iterdir()] == ["m.weights"]
    ctypes.memset(memory, 0, 3000)
    weights.fill(path, regions, HostLink())
    assert memory.raw == b"w" * 3000


def test_what_lies_in_memory_is_named_after_all_that_the_engine_is_told() -> None:
    plain = launch_of(spec_of("vllm")).env["DOHERTY_WEIGHTS_FORM"]
    assert launch_of(spec_of("vllm")).env["DOHERTY_WEIGHTS_FORM"] == plain
    assert launch_of(spec_of("vllm", "-tp", "2")).env["DOHERTY_WEIGHTS_FORM"] != plain
    assert "DOHERTY_WEIGHTS_FORM" not in launch_of(spec_of("vllm", snapshot=False)).env
