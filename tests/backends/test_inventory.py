"""Which cards this machine has: nvidia-smi's words, sysfs, and what hides or names cards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends.failure import StartError
from backends.gpus import Gpu, GpuInventory
from backends.inventory import card_use, find_gpus, nodes_with_processors, numactl_works
from backends.nvidia_smi import (
    SelectionError,
    User,
    gpus_of,
    names_of,
    read_cards,
    read_links,
    read_users,
    select,
)
from tests.fakes import nvidia_smi as fake

GOLDEN = Path(__file__).parents[1] / "golden"
NUMACTL = """#!/bin/sh
[ "$1" = --cpunodebind={node} ] && [ "$2" = --preferred={node} ] && shift 2 && exec "$@"
echo "numactl: setting membind failed: Operation not permitted" >&2
exit 1
"""


def put_numactl(folder: Path, node: int) -> None:
    """A `numactl` that may bind to `node` alone."""
    program = folder / "numactl"
    program.write_text(NUMACTL.format(node=node))
    program.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH beside the system's shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", fake.search_path(folder))
    return folder


LINKS = [
    ("one card", fake.ONE, {}),
    ("behind NVSwitch, beside network cards", fake.SWITCHED, dict.fromkeys(range(8), 0)),
    ("PCIe alone", fake.PCIE, {}),
    ("two pairs", fake.PAIRS, {0: 0, 1: 0, 2: 2, 3: 2}),
    ("no matrix", fake.DAMAGED, {}),
]


@pytest.mark.parametrize(("machine", "groups"), [x[1:] for x in LINKS], ids=[x[0] for x in LINKS])
def test_nvlink_groups(machine: fake.Machine, groups: dict[int, int]) -> None:
    assert read_links(machine.links) == groups


def test_the_matrix_of_a_machine_with_one_card_as_it_was_printed() -> None:
    text = (GOLDEN / "nvidia-smi-580.159.04-h100-topo.txt").read_text()
    assert read_links(text) == {}


def test_a_matrix_with_blanks_for_tabs_and_links_over_a_third() -> None:
    text = (
        "     GPU0 GPU1 GPU2 GPU3 CPU Affinity\n"
        "GPU0  X   NV1  SYS  SYS  0-15\n"
        "GPU1 NV1   X   SYS  NV2  0-15\n"
        "GPU2 SYS  SYS   X   NV1  0-15\n"
        "GPU3 SYS  NV2  NV1   X   0-15\n"
    )
    assert read_links(text) == {0: 0, 1: 0, 2: 0, 3: 0}


def test_the_list_of_cards() -> None:
    (card,) = read_cards(fake.ONE.cards)
    assert (card.index, card.name, card.memory_mib, card.used_mib) == (0, "NVIDIA H200", 143_771, 4)
    assert card.bus_id == "0000:01:00.0"
    assert [card.bus_id for card in read_cards(fake.SWITCHED.cards)][:2] == [
        "0000:18:00.0",
        "0000:2a:00.0",
    ]
    first, second = read_cards(fake.DAMAGED.cards)
    assert (first.index, first.split) == (0, True)
    assert (second.index, second.split, second.memory_mib, second.used_mib) == (2, False, 0, 0)


def test_who_computes() -> None:
    text = "1234, GPU-a1, 1957\n77, GPU-a2, [N/A]\n[Not Found], GPU-a1, 3\nNo running processes\n"
    assert read_users(text) == (User(1234, "GPU-a1", 1957), User(77, "GPU-a2", 0))


def test_names_and_ranges() -> None:
    assert names_of("0, 2-4,GPU-8932f937,3") == ("0", "2", "3", "4", "GPU-8932f937")
    assert names_of("") == ()


def test_selection() -> None:
    gpus = gpus_of(read_cards(fake.PAIRS.cards), {}, {})
    assert [g.device for g in select(gpus, ["3", "GPU-18932f93"])] == ["1", "3"]
    instance = select(gpus, ["MIG-a-b", "0"])
    assert [g.device for g in instance] == ["0", "MIG-a-b"]
    with pytest.raises(SelectionError, match=r"GPU '7', which is not there; .* lists: 0, 1, 2, 3"):
        select(gpus, ["7"])
    with pytest.raises(SelectionError, match="which several match"):
        select(gpus, ["GPU-"])


def test_lines_that_are_no_cards() -> None:
    text = (
        "index, uuid, name, memory.total [MiB], memory.used [MiB], pci.bus_id\n0, x, y, 1, 1, z\n"
    )
    assert read_cards(text) == ()


def test_a_machine_as_it_is(path: Path, tmp_path: Path) -> None:
    fake.install(path, fake.SWITCHED)
    put_numactl(path, 1)
    found = find_gpus("auto", {}, fake.sysfs(tmp_path / "sys", fake.SWITCHED))
    assert found.inventory is not None
    assert found.note == ""
    assert found.inventory.bindable_nodes == {1}
    fifth = found.inventory.gpus[5]
    assert (fifth.device, fifth.numa_node, fifth.nvlink_group) == ("5", 1, 0)
    assert (fifth.memory_mib, fifth.used_mib) == (143_771, 4)


def test_a_virtual_machine_has_no_nodes(path: Path, tmp_path: Path) -> None:
    fake.install(path, fake.ONE)
    put_numactl(path, 0)
    sysfs = fake.sysfs(tmp_path / "sys", fake.ONE, processors=("0-15",))
    found = find_gpus("auto", {}, sysfs)
    assert found.inventory is not None
    assert found.inventory.gpus[0].numa_node is None
    assert found.inventory.bindable_nodes == frozenset()


def test_memory_of_a_card_is_no_node_to_run_on(tmp_path: Path) -> None:
    sysfs = fake.sysfs(tmp_path, fake.ONE, processors=("0-71", "", "72-143"))
    assert nodes_with_processors(sysfs) == {0, 2}


def test_binding_is_tried_before_it_is_used(path: Path) -> None:
    assert not numactl_works(0), "there is none"
    (path / "numactl").write_bytes(b"\x7fELF, but not quite")
    (path / "numactl").chmod(0o755)
    assert not numactl_works(1)
    put_numactl(path, 1)
    assert numactl_works(1)
    assert not numactl_works(0)


SELECTIONS = [
    ("a list", "1,3", {}, "1 3", ""),
    ("a range", "0-2", {}, "0 1 2", ""),
    ("what the manager may see", "auto", {"CUDA_VISIBLE_DEVICES": "2,1"}, "1 2", "says '2,1'"),
    ("the list before it", "0", {"CUDA_VISIBLE_DEVICES": "2,1"}, "0", ""),
    ("everything hidden", "auto", {"CUDA_VISIBLE_DEVICES": "-1"}, "", "says '-1'"),
    ("nothing in it", "auto", {"CUDA_VISIBLE_DEVICES": ""}, "", "says ''"),
    ("strangers", "auto", {"CUDA_VISIBLE_DEVICES": "0,9"}, "", "names GPU '9', which is not"),
]


@pytest.mark.parametrize(
    ("setting", "environ", "devices", "note"),
    [s[1:] for s in SELECTIONS],
    ids=[s[0] for s in SELECTIONS],
)
def test_who_hides_and_who_names(
    path: Path, tmp_path: Path, setting: str, environ: dict[str, str], devices: str, note: str
) -> None:
    fake.install(path, fake.PAIRS)
    found = find_gpus(setting, environ, fake.sysfs(tmp_path / "sys", fake.PAIRS))
    assert found.inventory is not None
    assert [gpu.device for gpu in found.inventory.gpus] == devices.split()
    assert note in found.note


def test_a_stranger_in_the_configuration_stops_the_start(path: Path, tmp_path: Path) -> None:
    fake.install(path, fake.ONE)
    with pytest.raises(StartError, match=r"manager\.gpus names GPU '4', which is not there"):
        find_gpus("0,4", {}, tmp_path)


def test_a_card_that_is_split_is_not_found_but_its_instance_is_named(
    path: Path, tmp_path: Path
) -> None:
    fake.install(path, fake.DAMAGED)
    found = find_gpus("auto", {}, tmp_path)
    assert found.inventory is not None
    assert [gpu.device for gpu in found.inventory.gpus] == ["2"]
    assert found.note == "split by MIG, name the instances in manager.gpus: 0"
    found = find_gpus("MIG-377e0049-554c", {}, tmp_path)
    assert found.inventory is not None
    assert [gpu.device for gpu in found.inventory.gpus] == ["MIG-377e0049-554c"]


def test_without_nvidia_smi(path: Path, tmp_path: Path) -> None:
    found = find_gpus("auto", {}, tmp_path)
    assert (found.inventory, found.note) == (None, "there is no nvidia-smi")
    found = find_gpus("0-1", {}, tmp_path)
    assert found.inventory == GpuInventory((Gpu(device="0"), Gpu(device="1")))
    assert found.note == "there is no nvidia-smi; manager.gpus is believed"


def test_nvidia_smi_that_fails(path: Path, tmp_path: Path) -> None:
    mismatch = "Failed to initialize NVML: Driver/library version mismatch\nNVML library 580.1\n"
    broken = fake.Machine(cards=mismatch, links="")
    fake.install(path, broken, status=18)
    found = find_gpus("auto", {}, tmp_path)
    assert found.inventory is None
    assert found.note == (
        "nvidia-smi ended with status 18: Failed to initialize NVML: Driver/library version "
        "mismatch"
    )
    (path / "nvidia-smi").write_bytes(b"\x7fELF, but not quite")
    assert "cannot be run" in find_gpus("auto", {}, tmp_path).note


def test_none_is_none(path: Path, tmp_path: Path) -> None:
    fake.install(path, fake.ONE)
    assert find_gpus("none", {}, tmp_path).inventory is None


def test_what_is_used(path: Path) -> None:
    assert card_use().used_mib == {}
    fake.install(path, fake.PAIRS)
    (path / "users").write_text("4242, GPU-08932f93-7d72-4106-c12f-20bd9faed9f0, 1957\n")
    use = card_use()
    assert use.used_mib == {"0": 4, "1": 4, "2": 4, "3": 4}
    assert [user.pid for user in use.users] == [4242]
    assert os.environ["PATH"].startswith(str(path))
