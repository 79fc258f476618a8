"""What passes between the manager and the process that speaks with Ray, and what it means in words.

A line of JSON each way: orders down, news up. Octets of a log are carried as Latin-1, one character
each. A launch is named by its id, which is also the name of its actor and of its placement group.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from backends.cluster_cards import Node

LINE_BYTES_MAX = 64 * 1024 * 1024
NODE = "node:"  # by which Ray names a resource that one node has, 1.0 of it
NODE_SHARE = 0.001
_MODEL = "accelerator_type:"


class Cluster(msgspec.Struct, frozen=True, kw_only=True, tag="cluster", tag_field="word"):
    """The first order: which cluster this is about."""

    address: str
    namespace: str
    runtime_env: dict[str, Any]


class Need(msgspec.Struct, frozen=True):
    """What an engine takes of one node, and of which, where it has a lease there."""

    gpus: int = 0
    resources: dict[str, float] = {}
    node: str = ""

    @property
    def bundle(self) -> dict[str, float]:
        """Return it as Ray counts it. An engine without any need of its own takes a processor."""
        gpus = {"GPU": float(self.gpus)} if self.gpus else {}
        there = {NODE + self.node: NODE_SHARE} if self.node else {}
        return gpus | (self.resources or ({} if gpus else {"CPU": 1.0})) | there


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start", tag_field="word"):
    """Start it, or go on with it if it has been started: an order may be given again."""

    launch_id: str
    argv: tuple[str, ...]
    env: dict[str, str]
    ports: tuple[int, ...]
    need: Need


class Follow(msgspec.Struct, frozen=True, tag="follow", tag_field="word"):
    """Go on with one that has been started."""

    launch_id: str
    need: Need


class Signal(msgspec.Struct, frozen=True, tag="signal", tag_field="word"):
    launch_id: str
    number: int


class Keep(msgspec.Struct, frozen=True, tag="keep", tag_field="word"):
    """End all of the namespace but these."""

    launch_ids: tuple[str, ...]


Order = Start | Follow | Signal | Keep


class Connected(msgspec.Struct, frozen=True, tag="connected", tag_field="word"):
    """Ray answers, and has these launches."""

    launch_ids: tuple[str, ...]
    nodes: tuple[Node, ...]


class Nodes(msgspec.Struct, frozen=True, tag="nodes", tag_field="word"):
    """What has become of the nodes since they were told."""

    nodes: tuple[Node, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="word"):
    """Nothing can be done there; why."""

    problem: str


class Waits(msgspec.Struct, frozen=True, tag="waits", tag_field="word"):
    launch_id: str
    words: str


class Runs(msgspec.Struct, frozen=True, tag="runs", tag_field="word"):
    launch_id: str
    host: str
    node: str
    pid: int


class Said(msgspec.Struct, frozen=True, tag="said", tag_field="word"):
    """A piece of its log; `lost`: octets before it that were too many to keep."""

    launch_id: str
    text: str
    lost: int = 0


class Exited(msgspec.Struct, frozen=True, tag="exited", tag_field="word"):
    """Its end, by a wait status or in words."""

    launch_id: str
    status: int | None = None
    problem: str = ""


News = Connected | Nodes | Failed | Waits | Runs | Said | Exited


def waits_for(need: Need, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """Say what a start waits for; `nodes`: what each has in all, `free`: what all have now."""
    if need.node:
        return f"waits for {_amount(need.gpus, 'GPU')} on node {need.node} of the cluster"
    lacking = [
        (name, amount, max((node.get(name, 0.0) for node in nodes), default=0.0))
        for name, amount in need.bundle.items()
    ]
    for name, amount, most in lacking:
        if most < amount:
            return f"waits for a node with {_amount(amount, name)}; the largest has {most:g}"
    named = ", ".join(_amount(amount, name) for name, amount, _ in lacking)
    have = ", ".join(f"{free.get(name, 0.0):g} {_unit(name, 0)}" for name, _, _ in lacking)
    return f"waits for {named} on one node of the cluster; free on all: {have}"


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {_unit(name, amount)}"


def _unit(name: str, amount: float) -> str:
    return name + "s" * (name in {"GPU", "CPU"} and amount != 1)


def nodes_of(
    nodes: Iterable[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    groups: Iterable[Mapping[str, Any]],
    namespace: str,
) -> tuple[Node, ...]:
    """Return the nodes as Ray tells of them: all of them, what each has free, placement groups.

    What a bundle of this namespace has taken of a node that it names is ours.
    """
    taken: dict[str, float] = {}
    for group in groups:
        if group["state"] == "CREATED" and group["name"].startswith(namespace + "/"):
            for bundle in group["bundles"].values():
                for name in bundle:
                    if name.startswith(NODE):
                        host = name.removeprefix(NODE)
                        taken[host] = taken.get(host, 0.0) + bundle.get("GPU", 0.0)
    found: dict[str, Node] = {}
    for node in nodes:
        host, has = node["NodeManagerAddress"], node["Resources"]
        gpus = int(has.get("GPU", 0.0))
        ours = int(free.get(node["NodeID"], {}).get("GPU", 0.0) + taken.get(host, 0.0))
        if node["Alive"] and (host not in found or gpus > found[host].gpus):
            models = [name.removeprefix(_MODEL) for name in has if name.startswith(_MODEL)]
            found[host] = Node(host, gpus, min(gpus, ours), models[0] if models else "")
    return tuple(sorted(found.values(), key=lambda node: node.host))


def unplaced_words(number: int) -> str:
    """Say why one ended that no node has had room for."""
    return f"ended by {signal.Signals(number).name} before a node had room for it"


def one_line(error: BaseException) -> str:
    """Return what tells of an error of Ray's: its first line, and the cause where one follows."""
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    words = lines[0] if lines else type(error).__name__
    cause = f" {lines[-1]}" if words.endswith(":") and len(lines) > 1 else ""
    return (words + cause)[:400]
