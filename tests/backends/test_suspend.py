"""Suspension: by a driver that is not there (`fakes/cuda.c`) on real processes, and by SIGSTOP."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.engines import ENGINES
from backends.snapshots import suspend, tree
from backends.snapshots.base import Capability, SuspendError
from backends.snapshots.suspend import DriverSuspender, Freezer, suspender_of

SOURCE = Path(__file__).parents[1] / "fakes" / "cuda.c"
ONE = "GPU-00000000-0000-0000-0000-000000000001"
TWO = "GPU-02000000-0000-0000-0000-000000000002"
THREE = "GPU-03000000-0000-0000-0000-000000000003"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the driver that is not there")
    folder = tmp_path_factory.mktemp("cuda")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(SOURCE)]
    subprocess.run(command, check=True)
    return folder


class Cuda:
    """The state of the driver that is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def use(self, pid: int, state: int = 0) -> None:
        (self.folder / str(pid)).write_text(str(state))

    def state(self, pid: int) -> int:
        return int((self.folder / str(pid)).read_text())

    def fails(self, action: str, pid: int, error: int) -> None:
        (self.folder / f"{action}.{pid}").write_text(str(error))

    def hangs(self, action: str, pid: int) -> Path:
        path = self.folder / f"{action}.{pid}.hang"
        path.touch()
        return path

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cuda(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("FAKE_CUDA", str(tmp_path))
    return Cuda(tmp_path)


CHILD = """import subprocess
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
child.wait()"""


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """A process and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process.pid, child
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


async def test_all_processes_are_locked_before_one_is_moved(
    cuda: Cuda, family: tuple[int, int]
) -> None:
    for pid in family:
        cuda.use(pid)
    suspender = DriverSuspender()
    await suspender.suspend(family[0])
    assert [line.split()[0] for line in cuda.log] == ["lock", "lock", "checkpoint", "checkpoint"]
    assert [cuda.state(pid) for pid in family] == [2, 2]
    await suspender.suspend(family[0])  # once more changes nothing
    assert len(cuda.log) == 4
    await suspender.resume(family[0])
    assert [cuda.state(pid) for pid in family] == [0, 0]
    assert [line.split()[0] for line in cuda.log[4:]] == ["restore", "restore", "unlock", "unlock"]
    await suspender.resume(family[0])
    assert len(cuda.log) == 8


async def test_what_was_left_half_way_is_taken_up_there(
    cuda: Cuda, family: tuple[int, int]
) -> None:
    cuda.use(family[0], state=2)
    cuda.use(family[1], state=1)
    await DriverSuspender().suspend(family[0])
    assert [cuda.state(pid) for pid in family] == [2, 2]
    cuda.use(family[1], state=1)
    await DriverSuspender().resume(family[0])
    assert [cuda.state(pid) for pid in family] == [0, 0]


async def test_processes_without_a_gpu_are_left_alone(cuda: Cuda, family: tuple[int, int]) -> None:
    cuda.use(family[1])
    await DriverSuspender().suspend(family[0])
    assert cuda.log == [f"lock {family[1]}", f"checkpoint {family[1]}"]


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        ("lock", 600, "drain it first"),
        ("checkpoint", 801, "managed memory"),
        ("checkpoint", 777, "error 777"),
    ],
)
async def test_a_failure_is_taken_back(
    cuda: Cuda, family: tuple[int, int], action: str, error: int, said: str
) -> None:
    for pid in family:
        cuda.use(pid)
    cuda.fails(action, family[1], error)
    with pytest.raises(SuspendError, match=said) as raised:
        await DriverSuspender().suspend(family[0])
    assert raised.value.intact
    assert [cuda.state(pid) for pid in family] == [0, 0]


async def test_what_cannot_be_taken_back_is_told(cuda: Cuda, family: tuple[int, int]) -> None:
    for pid in family:
        cuda.use(pid)
    cuda.fails("checkpoint", family[1], 801)
    cuda.fails("restore", family[0], 2)
    with pytest.raises(SuspendError, match="checkpoint of process") as raised:
        await DriverSuspender().suspend(family[0])
    assert not raised.value.intact


async def test_a_call_that_hangs_is_killed_with_its_process(
    cuda: Cuda, family: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspend, "TIMEOUTS_S", {**suspend.TIMEOUTS_S, "lock": 0.5})
    cuda.use(family[0])
    hang = cuda.hangs("lock", family[0])
    with pytest.raises(SuspendError, match="no answer from the driver") as raised:
        await DriverSuspender().suspend(family[0])
    assert raised.value.intact  # the driver says that it runs
    hang.unlink()
    await asyncio.sleep(0.05)
    assert cuda.state(family[0]) == 0  # nobody is left who could still lock it


async def test_it_stays_suspended_where_the_gpu_has_no_room(
    cuda: Cuda, family: tuple[int, int]
) -> None:
    cuda.use(family[0], state=2)
    cuda.fails("restore", family[0], 2)
    with pytest.raises(SuspendError, match="too little memory") as raised:
        await DriverSuspender().resume(family[0])
    assert raised.value.intact
    assert cuda.state(family[0]) == 2


async def test_a_tree_without_gpus_and_a_dead_one_are_told_apart(
    cuda: Cuda, family: tuple[int, int]
) -> None:
    with pytest.raises(SuspendError, match="uses a GPU") as raised:
        await DriverSuspender().suspend(family[0])
    assert raised.value.intact
    cuda.use(family[0], state=3)
    with pytest.raises(SuspendError, match="lost") as raised:
        await DriverSuspender().suspend(family[0])
    assert not raised.value.intact
    with pytest.raises(SuspendError, match="gone") as raised:
        await DriverSuspender().suspend(2**22 - 1)
    assert not raised.value.intact


SMI = """#!/bin/sh
case "$*" in
*query-gpu*) {cards};;
*compute-apps*) echo "{pid}, {card}, {used}";;
esac
"""


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, pid: int, used_mib: int) -> None:
    script = folder / "nvidia-smi"
    cards = [f'echo "{n}, {c}, N, 9, 1, 0:{n}:0.0, N/A"' for n, c in enumerate((ONE, TWO, THREE))]
    text = SMI.format(cards="; ".join(cards), pid=pid, card=ONE, used=used_mib)
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(("cards", "pairs"), [("3", 3), ("1", 1)])
async def test_other_cards_are_named_to_the_driver_as_it_takes_them(
    cuda: Cuda,
    family: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cards: str,
    pairs: int,
) -> None:
    """All of the machine, swapped; where the process has seen one alone, that one."""
    fake_smi(tmp_path, monkeypatch, family[0], 5)
    monkeypatch.setenv("FAKE_CUDA_CARDS", cards)
    cuda.use(family[0], state=2)
    await DriverSuspender().resume(family[0], {ONE: TWO})
    told = [line for line in cuda.log if line.startswith("pair")]
    assert told == ["pair 00 02", "pair 02 00", "pair 03 03"][:pairs]


async def test_what_the_host_has_no_room_for_is_not_begun(
    cuda: Cuda, family: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, family[1], 1 << 40)
    cuda.use(family[1])
    with pytest.raises(SuspendError, match="put it to sleep first") as raised:
        await DriverSuspender().suspend(family[0])
    assert raised.value.intact
    assert cuda.log == []


def test_the_probe_says_what_is_missing(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DriverSuspender().probe() == Capability(works=True, moves=True)
    monkeypatch.setenv("FAKE_CUDA_VERSION", "12080")
    assert DriverSuspender().probe() == Capability(works=True)
    monkeypatch.setenv("FAKE_CUDA_VERSION", "12040")
    told = DriverSuspender().probe()
    assert (told.works, "570" in told.reason) == (False, True)
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    told = DriverSuspender().probe()
    assert (told.works, "no NVIDIA driver" in told.reason) == (False, True)


async def test_a_frozen_tree_stands_still_and_goes_on(family: tuple[int, int]) -> None:
    freezer = Freezer()
    assert freezer.probe().works
    for _ in range(2):
        await freezer.suspend(family[0])
        assert all(member.stopped for member in tree.members(family[0]))
    await freezer.resume(family[0])
    deadline_s = time.monotonic() + 5
    while any(member.stopped for member in tree.members(family[0])):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)
    with pytest.raises(SuspendError, match="gone"):
        await freezer.suspend(2**22 - 1)


def test_engines_without_a_gpu_are_frozen() -> None:
    assert isinstance(suspender_of(ENGINES["simulator"]), Freezer)
    assert isinstance(suspender_of(ENGINES["vllm"]), DriverSuspender)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@needs_root
async def test_a_process_in_a_cell_is_spoken_to_from_inside(cuda: Cuda) -> None:
    """The driver knows it by its number in there; from outside it is another one."""
    process = subprocess.Popen(
        ["unshare", "--pid", "--net", "--fork", "--mount-proc", "sleep", "60"],
        start_new_session=True,
    )
    try:
        deadline_s = time.monotonic() + 5
        while len(found := tree.members(process.pid)) < 2:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
        cuda.use(1)
        await DriverSuspender().suspend(process.pid)
        assert cuda.state(1) == 2
        cuda.use(found[1].pid)  # a driver that goes by the numbers of this side is spoken to, too
        (cuda.folder / "1").unlink()
        await DriverSuspender().suspend(process.pid)
        assert cuda.state(found[1].pid) == 2
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        for member in tree.members(process.pid):
            os.kill(member.pid, signal.SIGKILL)
        process.wait()
