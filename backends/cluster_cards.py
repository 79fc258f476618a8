"""The GPUs of a cluster as cards: counted by node, so that pools share them as on one machine.

The cluster gives out the devices, and names them to the engine. What is leased here is a place on
a node, `NODE/0` to `NODE/n-1`: whoever has the lease is started on that node, and on no other.
There are as many places as GPUs that are free or taken by such a lease; what anybody else of the
cluster has is not ours. Nobody knows which device a place is, so when others take one, the places
without a lease go first.

A pool that names `resources` of its own has no lease: which nodes have these, the cluster knows,
and it may have to get one first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from backends.gpus import Gpu, GpuInventory


class Node(msgspec.Struct, frozen=True):
    """A node that is alive; `ours`: GPUs that are free, or taken by leases of places on it."""

    host: str
    gpus: int = 0
    ours: int = 0
    model: str = ""


def places(nodes: Iterable[Node], held: Collection[str]) -> GpuInventory:
    """Return the places of these nodes, in order; `held`: those that are leased."""
    gpus: list[Gpu] = []
    for node in nodes:
        names = [f"{node.host}/{number}" for number in range(node.gpus)]
        unheld = [name for name in names if name not in held]
        gone = set(unheld[max(0, len(unheld) - (node.gpus - node.ours)) :])
        gpus += (Gpu(device=n, name=node.model, host=node.host) for n in names if n not in gone)
    return GpuInventory(tuple(gpus))


def host_of(devices: Sequence[str]) -> str:
    """Return the node that these places are of; empty: they are none."""
    host, slash, number = devices[0].rpartition("/") if devices else ("", "", "")
    return host if slash and number.isdecimal() else ""


def believed(told: Iterable[Node], before: Iterable[Node], now: Iterable[Node]) -> tuple[Node, ...]:
    """Return what to tell of the nodes after two looks at them.

    What is free and what is taken come from different processes of the cluster, one a moment after
    the other, so one look may see a GPU twice or not at all. Two that agree are believed; which
    nodes there are, each look says.
    """
    last, known = ({node.host: node for node in nodes} for nodes in (before, told))
    nodes = ((node, known.get(node.host), last.get(node.host)) for node in now)
    return tuple(node if node == seen or seen is None else old or seen for node, old, seen in nodes)
