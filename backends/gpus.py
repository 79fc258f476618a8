"""Leases of GPUs: a card is one replica's at a time, and a replica's cards lie close together.

**Which cards.** The cards of a tensor-parallel engine exchange activations at every layer, so the
link between them matters first, the memory next to them second. A lease is looked for in four
places, and the first that has enough free cards gives them:

1. cards of one NVLink group on one NUMA node;
2. cards of one NVLink group;
3. cards of one NUMA node;
4. any cards.

All of one lease are of one model: an engine's ranks wait for the slowest, and size their KV caches
by the smallest. In a cluster they are of one node. Among places that are big enough the smallest is
taken (best fit; of equals, the one in the smallest surroundings), so that the largest free group
stays whole for the replica that needs it; within a place that spans several groups, whole groups go
first. Ties go to the lowest number. There is no luck in it: the same leases in the same order give
the same cards in every life of the manager.

**What a card is called.** By its number in the order of the PCI bus, and the engine is told that
this is the order (`CUDA_DEVICE_ORDER`): CUDA itself numbers the fastest first, nvidia-smi by the
bus. UUIDs would be the safer name, but vLLM took nothing but numbers until its pull request 45026
(June 2026), and dies on a UUID with an error about the model. A MIG instance has no number that
CUDA takes, so it goes by its UUID; it is leased when it is named, never found.

**Facts over rules.** What a manager before has started runs where it runs, and a pool may pin its
replicas by `CUDA_VISIBLE_DEVICES` or flags of its own, two to a card if its owner likes. Such
claims are taken as they come; a lease never gives out a card that anybody has.

A replica that needs more cards than are free waits until some are given back. Nothing is kept for
it meanwhile: an order in which small ones wait for large ones leaves cards idle.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import msgspec

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
MEMORY_BINDINGS = ("--numa-bind", "--numa-node")  # vLLM's and SGLang's own

DEVICE_LIST = "--device-ids"  # vLLM's
FIRST_DEVICE, DEVICE_STEP = "--base-gpu-id", "--gpu-id-step"  # SGLang's


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One card. `device` is what CUDA_VISIBLE_DEVICES calls it."""

    device: str
    uuid: str = ""
    name: str = ""
    memory_mib: int = 0
    used_mib: int = 0  # when it was looked at; not all of it need be ours
    numa_node: int | None = None
    nvlink_group: int | None = None  # cards with one number are linked; None: with nobody
    host: str = ""  # the node of a cluster, which itself says what card it is; empty: this machine


class GpuInventory(msgspec.Struct, frozen=True):
    """The cards that this manager may use, in order, and the NUMA nodes worth binding to.

    None are where there is but one node, or where processes may not be bound.
    """

    gpus: tuple[Gpu, ...]
    bindable_nodes: frozenset[int] = frozenset()

    def gpu(self, name: str) -> Gpu | None:
        """Return the card that goes by this name, a UUID perhaps cut short as CUDA takes it."""
        return next((gpu for gpu in self.gpus if goes_by(gpu, name)), None)


class Lease(msgspec.Struct, frozen=True):
    """Cards of one owner. `numa_node` is told when they share one that can be bound to."""

    devices: tuple[str, ...] = ()
    numa_node: int | None = None
    named: bool = True  # so that CUDA knows them by it

    @property
    def environment(self) -> dict[str, str]:
        """What an engine must be told; nothing when it has no cards of ours."""
        told = self.named and self.devices
        return {VISIBLE: ",".join(self.devices), **ORDER} if told else {}


class NoGpuError(Exception):
    """Not enough cards are free; the text says who has them and what would help."""


class GpuLeases:
    """The cards that this manager has given out."""

    def __init__(self, inventory: GpuInventory) -> None:
        self.inventory = inventory
        self.withdrawn: frozenset[str] = frozenset()  # will be taken away: given out no more
        self._held: dict[str, tuple[str, ...]] = {}

    @property
    def holders(self) -> Mapping[str, tuple[str, ...]]:
        return self._held

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the cards that stay."""
        return tuple(gpu for gpu in self.inventory.gpus if gpu.device not in self.withdrawn)

    @property
    def free(self) -> tuple[Gpu, ...]:
        """Return those of them that nobody has."""
        taken = {device for devices in self._held.values() for device in devices}
        return tuple(gpu for gpu in self.gpus if gpu.device not in taken)

    def lease(self, owner: str, count: int) -> Lease:
        """Give `owner` this many cards, those that it has if they are as many.

        Raises `NoGpuError`, and then it has none.
        """
        held = self._held.get(owner, ())
        if len(held) == count and {gpu.device for gpu in self.gpus}.issuperset(held):
            return self._lease(held)
        self.release(owner)
        if not count:
            return Lease()
        free = self.free
        chosen = choose(free, count)
        if chosen is None:
            raise NoGpuError(self._refusal(count, free))
        self._held[owner] = tuple(gpu.device for gpu in chosen)
        return self._lease(self._held[owner])

    def lease_again(self, owner: str, devices: Sequence[str], *, moves: bool) -> tuple[str, ...]:
        """Give `owner` the cards that it had, or if it `moves` as many of the same model.

        Raises `NoGpuError`, and then it has none.
        """
        if self._held.get(owner) == tuple(devices):
            return tuple(devices)
        self.release(owner)
        free = self.free
        if {gpu.device for gpu in free}.issuperset(devices):
            self._held[owner] = tuple(devices)
            return tuple(devices)
        names = {gpu.name for device in devices if (gpu := self.inventory.gpu(device))}
        chosen = choose([g for g in free if {g.name} == names], len(devices)) if moves else None
        if chosen is None:
            raise NoGpuError(self._refusal(len(devices), free if moves else ()))
        self._held[owner] = tuple(gpu.device for gpu in chosen)
        return self._held[owner]

    def claim(self, owner: str, devices: Iterable[str]) -> Lease:
        """Note that `owner` uses these cards, whatever else is noted of them."""
        known = ((name, self.inventory.gpu(name)) for name in devices)
        self._held[owner] = tuple(gpu.device if gpu else name for name, gpu in known)
        return self._lease(self._held[owner])

    def release(self, owner: str) -> bool:
        """Take back what `owner` has; say whether that was anything."""
        return bool(self._held.pop(owner, ()))

    def _lease(self, devices: tuple[str, ...]) -> Lease:
        nodes = {gpu.numa_node if (gpu := self.inventory.gpu(d)) else None for d in devices}
        node = nodes.pop() if len(nodes) == 1 else None
        named = not any((gpu := self.inventory.gpu(d)) and gpu.host for d in devices)
        return Lease(devices, node if node in self.inventory.bindable_nodes else None, named)

    def _refusal(self, count: int, free: Sequence[Gpu]) -> str:
        gpus = self.gpus
        models = {_alike(gpu) for gpu in gpus}
        most = max((sum(_alike(g) == model for g in gpus) for model in models), default=0)
        if count > most and any(gpu.host for gpu in gpus):
            return (
                f"it needs {_cards(count)} on one node and no node has more than {most} for it; "
                "lower the parallelism in the pool's args, or its gpus, or add a larger node"
            )
        if count > most:
            kind = " of one model" if len(models) > 1 else ""
            return (
                f"it needs {_cards(count)}{kind} and this machine has {most} for it; lower the "
                "parallelism in the pool's args, or its gpus, or name more in manager.gpus"
            )
        held = "; ".join(f"{owner} has {_list(devices)}" for owner, devices in self._held.items())
        return (
            f"it needs {_cards(count)} and {_free(free)} free ({held}); it starts when "
            "enough are given back: stop one of these, lower the replicas of a pool, or let pools "
            f"share a card by {VISIBLE} in their env"
        )


def choose(free: Sequence[Gpu], count: int) -> tuple[Gpu, ...] | None:
    """Return the cards of a lease, by the rule above; None when too few are free."""
    for level, place in enumerate(_PLACES):
        fitting = [cards for cards in _partition(free, place) if len(cards) >= count]
        if fitting:
            rooms = [_room(free, cards[0])[level:] for cards in fitting]
            return _gather(fitting[rooms.index(min(rooms))], count)
    return None


def bound_to_node(lease: Lease, args: Sequence[str]) -> tuple[str, ...]:
    """Return what to put before an engine's command so that it runs next to its cards.

    Copies from host to card cross the link between sockets otherwise. Memory is preferred there,
    not bound: an engine that needs more than a node has would be killed for it. An engine that was
    told to bind itself is left to it.
    """
    own = any(arg.partition("=")[0] in MEMORY_BINDINGS for arg in args)
    if lease.numa_node is None or own:
        return ()
    return ("numactl", f"--cpunodebind={lease.numa_node}", f"--preferred={lease.numa_node}")


def pinned(env: Mapping[str, str], args: Sequence[str], count: int) -> tuple[str, ...] | None:
    """Return the cards that a pool names itself; None when it leaves them to us.

    By its environment, or by the flags that count cards from the first that the engine sees: these
    would miss among the cards of a lease.
    """
    if VISIBLE in env:
        return tuple(name.strip() for name in env[VISIBLE].split(",") if name.strip())
    values = dict(zip(args, [*args[1:], ""], strict=False))
    values |= {flag: value for flag, sign, value in (a.partition("=") for a in args) if sign}
    if DEVICE_LIST in values:
        return tuple(name.strip() for name in values[DEVICE_LIST].split(",") if name.strip())
    first, step = values.get(FIRST_DEVICE, ""), values.get(DEVICE_STEP, "1")
    if not (first.isdecimal() and step.isdecimal()):
        return None
    return tuple(str(int(first) + int(step) * rank) for rank in range(count))


def goes_by(gpu: Gpu, name: str) -> bool:
    """Say whether CUDA would take `name` for this card."""
    return gpu.uuid.startswith(name) if name.startswith("GPU-") else gpu.device == name


def described(gpu: Gpu) -> str:
    """Put a card into words: what is known of it."""
    known = (
        gpu.name,
        f"{gpu.used_mib:,} of {gpu.memory_mib:,} MiB used" if gpu.memory_mib else "",
        "" if gpu.numa_node is None else f"NUMA node {gpu.numa_node}",
        "" if gpu.nvlink_group is None else f"NVLink group {gpu.nvlink_group}",
    )
    return f"{gpu.device}: {', '.join(filter(None, known)) or 'nothing known'}"


def _by_link_and_node(gpu: Gpu) -> Hashable:
    return _alike(gpu), _link(gpu), gpu.numa_node


def _alike(gpu: Gpu) -> Hashable:
    """Return what all cards of a lease have in common."""
    return gpu.host, gpu.name


def _link(gpu: Gpu) -> Hashable:
    """Return the NVLink group; a card that is linked with nobody is a group by itself."""
    return gpu.device if gpu.nvlink_group is None else gpu.nvlink_group


_PLACES: tuple[Callable[[Gpu], Hashable], ...] = (
    _by_link_and_node,
    lambda gpu: (_alike(gpu), _link(gpu)),
    lambda gpu: (_alike(gpu), gpu.numa_node),
    _alike,
)


def _room(free: Sequence[Gpu], gpu: Gpu) -> tuple[int, ...]:
    """Say how many cards are free around this one, from its nearest place to the widest."""
    return tuple(sum(place(other) == place(gpu) for other in free) for place in _PLACES)


def _partition(gpus: Sequence[Gpu], key: Callable[[Gpu], Hashable]) -> list[list[Gpu]]:
    """Return the cards by `key`, each part and all parts in the order of the inventory."""
    parts: dict[Hashable, list[Gpu]] = {}
    for gpu in gpus:
        parts.setdefault(key(gpu), []).append(gpu)
    return list(parts.values())


def _gather(gpus: Sequence[Gpu], count: int) -> tuple[Gpu, ...]:
    """Take `count` of enough cards: whole groups, the largest first, and the rest by best fit."""
    parts = _partition(gpus, _by_link_and_node)
    taken: list[Gpu] = []
    while len(taken) < count:
        missing = count - len(taken)
        enough = [part for part in parts if len(part) >= missing]
        part = min(enough, key=len) if enough else max(parts, key=len)
        parts.remove(part)
        taken += part[:missing]
    return tuple(sorted(taken, key=gpus.index))


def _cards(count: int) -> str:
    return f"{count} GPU" + "s" * (count != 1)


def _list(devices: Sequence[str]) -> str:
    return ("GPU " if len(devices) == 1 else "GPUs ") + ", ".join(devices)


def _free(free: Sequence[Gpu]) -> str:
    if not free:
        return "none is"
    return _list([gpu.device for gpu in free]) + (" is" if len(free) == 1 else " are")
