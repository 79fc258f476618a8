"""What nvidia-smi prints, read into values; nothing here runs it.

It is asked for what every driver since R450 tells (`nvidia-smi --help-query-gpu`), and believed
line by line: a card that is lost, or whose line cannot be read, is not there, and a figure in
brackets (`[N/A]`, `[Not Supported]`) is 0. A library would tell the same and be one more thing to
install.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from backends.gpus import Gpu, goes_by

QUERY_CARDS = (
    "--query-gpu=index,uuid,name,memory.total,memory.used,pci.bus_id,mig.mode.current",
    "--format=csv,noheader,nounits",
)
QUERY_LINKS = ("topo", "-m")
QUERY_USERS = (
    "--query-compute-apps=pid,gpu_uuid,used_memory",
    "--format=csv,noheader,nounits",
)
AUTO, NONE = "auto", "none"
_NVLINK = re.compile(r"NV\d+")
_CARD_LABEL = re.compile(r"GPU\d+")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RANGE = re.compile(r"(\d{1,3})-(\d{1,3})")
_UUID_PREFIXES = ("GPU-", "MIG-")


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One line of nvidia-smi's list."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    used_mib: int
    bus_id: str  # as sysfs writes it: 0000:1b:00.0
    split: bool  # into MIG instances; it cannot be used whole


class User(msgspec.Struct, frozen=True):
    """A process that computes on a card."""

    pid: int
    uuid: str
    used_mib: int


class SelectionError(Exception):
    """A list of cards names one that is not there."""


def read_cards(text: str) -> tuple[Card, ...]:
    """Return the cards of `QUERY_CARDS`, in their order."""
    cards = []
    for fields in _rows(text, 6):
        index, uuid, name, total, used, bus_id = fields[:6]
        if not index.isascii() or not index.isdigit() or not uuid.startswith("GPU-"):
            continue
        cards.append(
            Card(
                index=int(index),
                uuid=uuid,
                name=name,
                memory_mib=_number(total),
                used_mib=_number(used),
                bus_id=_sysfs_bus_id(bus_id),
                split=fields[6:7] == ["Enabled"],
            )
        )
    return tuple(cards)


def read_users(text: str) -> tuple[User, ...]:
    """Return the processes of `QUERY_USERS`."""
    return tuple(
        User(int(pid), uuid, _number(used))
        for pid, uuid, used in (fields[:3] for fields in _rows(text, 3))
        if pid.isascii() and pid.isdigit()
    )


def read_links(text: str) -> dict[int, int]:
    """Return the NVLink group of each card that is linked: the lowest number in it.

    The matrix has a column for each card first, whatever else follows (network cards, affinities).
    Who is linked with somebody who is linked with a third is in one group with the third.
    """
    group: dict[int, int] = {}
    rows = [_ANSI.sub("", line).split() for line in text.splitlines()]
    header = next((row for row in rows if row[:1] == ["GPU0"]), [])
    columns = [int(label[3:]) for label in header if _CARD_LABEL.fullmatch(label)]
    for row in rows:
        if not row or row is header or not _CARD_LABEL.fullmatch(row[0]):
            continue
        this = int(row[0][3:])
        for other, cell in zip(columns, row[1:], strict=False):
            if _NVLINK.fullmatch(cell):
                _join(group, this, other)
    return group


def gpus_of(
    cards: Iterable[Card], links: Mapping[int, int], nodes: Mapping[str, int]
) -> tuple[Gpu, ...]:
    """Put together what the list, the matrix and sysfs (`nodes`, by bus id) tell."""
    return tuple(
        Gpu(
            device=str(card.index),
            uuid=card.uuid,
            name=card.name,
            memory_mib=card.memory_mib,
            used_mib=card.used_mib,
            numa_node=nodes.get(card.bus_id),
            nvlink_group=links.get(card.index),
        )
        for card in cards
    )


def names_of(selection: str) -> tuple[str, ...]:
    """Return the names in a list such as `0,2-3,GPU-8932f937`; ranges are written out."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in selection.split(","))):
        if span := _RANGE.fullmatch(part):
            names += map(str, range(int(span[1]), int(span[2]) + 1))
        else:
            names.append(part)
    return tuple(dict.fromkeys(names))


def select(gpus: Sequence[Gpu], names: Iterable[str]) -> tuple[Gpu, ...]:
    """Return the cards that `names` name, in the order of the machine.

    A UUID may be cut short, as CUDA takes it. A MIG instance is on no list here: it is believed.
    Raises `SelectionError`.
    """
    chosen: list[Gpu] = []
    for name in names:
        if name.startswith("MIG-"):
            chosen.append(Gpu(device=name, uuid=name, name="MIG"))
            continue
        found = [gpu for gpu in gpus if goes_by(gpu, name)]
        if len(found) != 1:
            listed = ", ".join(gpu.device for gpu in gpus) or "none"
            what = "which is not there" if not found else "which several match"
            raise SelectionError(f"GPU '{name}', {what}; nvidia-smi lists: {listed}")
        chosen += found
    order = {gpu.device: index for index, gpu in enumerate(gpus)}
    return tuple(sorted(chosen, key=lambda gpu: order.get(gpu.device, len(order))))


def unlisted(names: Iterable[str]) -> tuple[Gpu, ...]:
    """Return cards of which nothing but the names is known."""
    return tuple(
        Gpu(device=name, uuid=name if name.startswith(_UUID_PREFIXES) else "") for name in names
    )


def _rows(text: str, columns: int) -> Iterable[list[str]]:
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= columns:
            yield fields


def _number(field: str) -> int:
    return int(field) if field.isascii() and field.isdigit() else 0


def _sysfs_bus_id(bus_id: str) -> str:
    """Write `00000000:1B:00.0` as the folders of sysfs do: four digits of domain, small letters."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _join(group: dict[int, int], one: int, other: int) -> None:
    first, second = group.setdefault(one, one), group.setdefault(other, other)
    low, high = min(first, second), max(first, second)
    for card, number in group.items():
        if number == high:
            group[card] = low
