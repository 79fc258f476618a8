"""Which GPUs this machine has, and what is used of them: asks nvidia-smi and sysfs.

Without nvidia-smi there is nothing to lease: engines get the environment as it is, unless somebody
names cards, which are then believed. The same where nvidia-smi cannot talk to the driver. Cards
that the manager's own `CUDA_VISIBLE_DEVICES` hides are not ours to give.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.failure import StartError
from backends.gpus import VISIBLE, Gpu, GpuInventory
from backends.nvidia_smi import (
    AUTO,
    NONE,
    QUERY_CARDS,
    QUERY_LINKS,
    QUERY_USERS,
    Card,
    SelectionError,
    User,
    gpus_of,
    names_of,
    read_cards,
    read_links,
    read_users,
    select,
    unlisted,
)

PROGRAM = "nvidia-smi"
ASK_TIMEOUT_S = 30.0  # without persistence mode it loads the driver first
HIDES_ALL = frozenset({"-1", "NoDevFiles"})  # what CUDA, and those who set it, mean by no card
_SYS = Path("/sys")
_NODE_FOLDER = re.compile(r"node\d+")


class Found(msgspec.Struct, frozen=True):
    """The cards, or None where there is nothing to lease; and what is to be said about it.

    `seen`: nvidia-smi tells of them, so that it can be asked what is used.
    """

    inventory: GpuInventory | None
    note: str = ""
    seen: bool = False


class CardUse(msgspec.Struct, frozen=True):
    """What is used at one moment: memory by device, and the processes that nvidia-smi names."""

    used_mib: dict[str, int] = {}
    users: tuple[User, ...] = ()


def find_gpus(setting: str, environ: Mapping[str, str], sysfs: Path = _SYS) -> Found:
    """Return the cards to lease by `manager.gpus`. Raises `StartError` when it names strangers."""
    if setting == NONE:
        return Found(None, "manager.gpus says none")
    named = names_of(setting) if setting != AUTO else None
    text, problem = ask(QUERY_CARDS)
    if text is None:
        if named is None:
            return Found(None, problem)
        return Found(GpuInventory(unlisted(named)), f"{problem}; manager.gpus is believed")
    cards = read_cards(text)
    links, _ = ask(QUERY_LINKS)
    gpus = gpus_of(cards, read_links(links or ""), numa_nodes(cards, sysfs))
    note = ""
    if named is not None:
        try:
            chosen = select(gpus, named)
        except SelectionError as error:
            raise StartError(f"manager.gpus names {error}") from error
    else:
        chosen, note = _visible(gpus, cards, environ)
    return Found(GpuInventory(chosen, _bindable(chosen, sysfs)), note, seen=True)


def _visible(
    gpus: Sequence[Gpu], cards: Sequence[Card], environ: Mapping[str, str]
) -> tuple[tuple[Gpu, ...], str]:
    """Return the cards that nobody has hidden or split."""
    outer = environ.get(VISIBLE)
    if outer is not None:
        names = [name for name in names_of(outer) if name not in HIDES_ALL]
        try:
            return select(gpus, names), f"{VISIBLE} of the manager says {outer!r}"
        except SelectionError as error:
            return (), f"{VISIBLE} of the manager names {error}"
    split = {str(card.index) for card in cards if card.split}
    whole = tuple(gpu for gpu in gpus if gpu.device not in split)
    note = f"split by MIG, name the instances in manager.gpus: {', '.join(sorted(split))}"
    return whole, note if split else ""


def _bindable(gpus: Sequence[Gpu], sysfs: Path) -> frozenset[int]:
    """Return the nodes of these cards, where there are others and a process may be bound."""
    if len(nodes_with_processors(sysfs)) < 2:
        return frozenset()
    nodes = {gpu.numa_node for gpu in gpus if gpu.numa_node is not None}
    return frozenset(node for node in nodes if numactl_works(node))


def ask(query: Sequence[str]) -> tuple[str | None, str]:
    """Return what nvidia-smi prints; None, and why, when it cannot be asked."""
    program = shutil.which(PROGRAM)
    if program is None:
        return None, f"there is no {PROGRAM}"
    try:
        run = subprocess.run(  # noqa: S603  # the arguments are our own
            [program, *query],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{PROGRAM} cannot be run: {error}"
    text = run.stdout.decode("utf-8", "replace")
    if run.returncode:
        said = (text + run.stderr.decode("utf-8", "replace")).strip().partition("\n")[0]
        return None, f"{PROGRAM} ended with status {run.returncode}: {said}"
    return text, ""


def numa_nodes(cards: Sequence[Card], sysfs: Path = _SYS) -> dict[str, int]:
    """Return the node of each card by bus id; the kernel's -1 is no node."""
    nodes: dict[str, int] = {}
    with_processors = nodes_with_processors(sysfs)
    for card in cards:
        with suppress(OSError, ValueError):
            node = int((sysfs / "bus/pci/devices" / card.bus_id / "numa_node").read_text())
            if node in with_processors:
                nodes[card.bus_id] = node
    return nodes


def nodes_with_processors(sysfs: Path = _SYS) -> frozenset[int]:
    """Return the NUMA nodes that something can run on; the memory of a card may be one, too."""
    found = set()
    with suppress(OSError):
        for folder in (sysfs / "devices/system/node").iterdir():
            with suppress(OSError):
                if _NODE_FOLDER.fullmatch(folder.name) and (folder / "cpulist").read_text().strip():
                    found.add(int(folder.name[4:]))
    return frozenset(found)


def numactl_works(node: int) -> bool:
    """Say whether a process may be bound: containers often lack the right, and cpusets the node."""
    program = shutil.which("numactl")
    if program is None:
        return False
    try:
        run = subprocess.run(  # noqa: S603  # the arguments are our own
            [program, f"--cpunodebind={node}", f"--preferred={node}", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


def card_use() -> CardUse:
    """Return what is used of each card now; nothing when nvidia-smi does not say."""
    cards, _ = ask(QUERY_CARDS)
    users, _ = ask(QUERY_USERS)
    used_mib: dict[str, int] = {}
    for card in read_cards(cards or ""):
        used_mib[str(card.index)] = card.used_mib
    return CardUse(used_mib, read_users(users or ""))
