"""What nvidia-smi prints on several machines, in its format, and a program that prints it.

The texts keep what makes reading hard: tabs and underlining in the head of the matrix, columns of
network cards, figures that a driver does not tell, cards that are lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What it prints about one machine, and where sysfs puts the cards."""

    cards: str
    links: str
    nodes: dict[str, int] = {}  # by bus id
    users: str = ""


def _matrix(rows: Sequence[str], more: Sequence[str] = ()) -> str:
    """Write the matrix of `rows` (cells by blanks) with further columns as nvidia-smi does."""
    heads = [f"GPU{index}" for index in range(len(rows))]
    columns = [*heads, *more, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]
    lines = ["\t\x1b[4m" + "\t".join(columns) + "\x1b[0m"]
    for head, row in zip(heads, rows, strict=True):
        cells = [" X " if cell == "X" else cell for cell in row.split()]
        lines.append("\t".join([head, *cells, "0-95", "0", "", "N/A"]))
    lines += [f"{nic}\t" + "\t".join(["SYS"] * len(rows)) + "\t X " for nic in more]
    legend = (
        "Legend:",
        "",
        "  X    = Self",
        "  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes "
        "(e.g., QPI/UPI)",
        "  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host "
        "Bridges within a NUMA node",
        "  PIX  = Connection traversing at most a single PCIe bridge",
        "  NV#  = Connection traversing a bonded set of # NVLinks",
    )
    return "\n".join([*lines, "", *legend, ""])


def _cards(name: str, memory_mib: int, buses: Sequence[str], mig: str = "Disabled") -> str:
    return "".join(
        f"{index}, GPU-{index}8932f93-7d72-4106-c12f-20bd9faed9f{index}, {name}, {memory_mib}, 4, "
        f"00000000:{bus}:00.0, {mig}\n"
        for index, bus in enumerate(buses)
    )


SWITCH_BUSES = ("18", "2A", "3A", "5D", "9A", "AB", "BA", "DB")

ONE = Machine(
    cards=_cards("NVIDIA H200", 143_771, ("01",)),
    links=_matrix(["X"]),
    nodes={"0000:01:00.0": -1},  # a virtual machine: the kernel knows no node
)
SWITCHED = Machine(
    cards=_cards("NVIDIA H200", 143_771, SWITCH_BUSES),
    links=_matrix(
        [
            " ".join(["NV18"] * row + ["X"] + ["NV18"] * (7 - row) + ["PIX", "SYS"])
            for row in range(8)
        ],
        more=("NIC0", "NIC1"),
    ),
    nodes={f"0000:{bus.lower()}:00.0": row // 4 for row, bus in enumerate(SWITCH_BUSES)},
)
PCIE = Machine(
    cards=_cards("NVIDIA L40S", 46_068, ("17", "65", "CA", "E3"), mig="[N/A]"),
    links=_matrix(["X NODE SYS SYS", "NODE X SYS SYS", "SYS SYS X NODE", "SYS SYS NODE X"]),
    nodes={
        "0000:17:00.0": 0,
        "0000:65:00.0": 0,
        "0000:ca:00.0": 1,
        "0000:e3:00.0": 1,
    },
)
PAIRS = Machine(
    cards=_cards("NVIDIA A100 80GB PCIe", 81_920, ("17", "65", "CA", "E3")),
    links=_matrix(["X NV12 SYS SYS", "NV12 X SYS SYS", "SYS SYS X NV12", "SYS SYS NV12 X"]),
    nodes={"0000:17:00.0": 0, "0000:65:00.0": 0, "0000:ca:00.0": 0, "0000:e3:00.0": 0},
)
DAMAGED = Machine(
    cards=(
        "0, GPU-a1, NVIDIA A100-SXM4-40GB, 40960, 3, 00000000:07:00.0, Enabled\n"
        "Unable to determine the device handle for GPU0000:0F:00.0: GPU is lost.  Reboot the "
        "system to recover this GPU\n"
        "2, GPU-a2, NVIDIA A100-SXM4-40GB, [N/A], [Not Supported], 00000000:47:00.0, Disabled\n"
        "\n"
    ),
    links="Failed to get the topology\n",
)


def install(folder: Path, machine: Machine, *, status: int = 0) -> Path:
    """Put a program `nvidia-smi` into `folder` that prints what `machine` says; return `folder`.

    The texts lie beside it, so that a test can change them under it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("cards", machine.cards),
        ("links", machine.links),
        ("users", machine.users),
    ):
        (folder / name).write_text(text)
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --query-gpu=*) cat '{folder}/cards';;\n"
        f"  topo) cat '{folder}/links';;\n"
        f"  --query-compute-apps=*) cat '{folder}/users';;\n"
        "esac\n"
        f"exit {status}\n"
    )
    program.chmod(0o755)
    return folder


def sysfs(folder: Path, machine: Machine, processors: Sequence[str] = ("0-47", "48-95")) -> Path:
    """Write the part of /sys that tells of NUMA; a node without processors has an empty list."""
    for bus_id, node in machine.nodes.items():
        card = folder / "bus/pci/devices" / bus_id
        card.mkdir(parents=True)
        (card / "numa_node").write_text(f"{node}\n")
    for node, cpus in enumerate(processors):
        place = folder / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cpus + "\n")
    (folder / "devices/system/node/online").write_text("0-1\n")
    return folder


def search_path(*folders: Path) -> str:
    """Return a PATH with `folders` first."""
    return os.pathsep.join([*map(str, folders), os.defpath])
