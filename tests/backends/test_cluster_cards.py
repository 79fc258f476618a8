"""The lease book of a cluster: places by node, what others have, nodes that come and go."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest

from backends.arbiter import arbitrate, replicas_possible
from backends.cards import Cards
from backends.claims import Claim, Holder, Lower, Raise, Room, Wait
from backends.cluster_cards import Node, believed, host_of, places
from backends.gpus import GpuLeases, NoGpuError
from backends.ladder import Rung, WayUp
from backends.log import Log
from backends.providers.ray_words import Need, nodes_of, waits_for

TWO = (Node("a", 2, 2), Node("b", 4, 4))


def names(*nodes: Node, held: frozenset[str] = frozenset()) -> list[str]:
    return [gpu.device for gpu in places(nodes, held).gpus]


def test_places_are_counted_by_node_without_those_that_others_have() -> None:
    assert names(*TWO) == ["a/0", "a/1", "b/0", "b/1", "b/2", "b/3"]
    assert names(Node("a", 4, 1), Node("b", 0, 0)) == ["a/0"]
    # Which device a place is, nobody knows: what others take is never one that is leased.
    assert names(Node("a", 4, 2), held=frozenset({"a/1", "a/3"})) == ["a/1", "a/3"]
    assert names(Node("a", 4, 1), held=frozenset({"a/1", "a/3"})) == ["a/1", "a/3"]


@pytest.mark.parametrize(
    ("devices", "host"),
    [
        (("10.0.0.7/0", "10.0.0.7/3"), "10.0.0.7"),
        (("fd00::7/1",), "fd00::7"),
        ((), ""),
        (("0",), ""),  # pinned by its pool: no place of ours
        (("GPU-8932f937",), ""),
    ],
)
def test_a_lease_names_its_node(devices: tuple[str, ...], host: str) -> None:
    assert host_of(devices) == host


def test_a_lease_is_of_one_node_and_the_cluster_names_the_devices() -> None:
    leases = GpuLeases(places(TWO, ()))
    lease = leases.lease("m-0", 2)
    assert lease.devices == ("a/0", "a/1"), "best fit"
    assert lease.environment == {}
    assert leases.lease("m-1", 3).devices == ("b/0", "b/1", "b/2")
    with pytest.raises(NoGpuError, match="it needs 2 GPUs and GPU b/3 is free"):
        leases.lease("m-2", 2)
    leases.release("m-0")
    with pytest.raises(NoGpuError, match="GPUs a/0, a/1, b/3 are free"):
        leases.lease("m-2", 3)
    with pytest.raises(NoGpuError, match="no node has more than 4"):
        leases.lease("m-2", 5)


async def test_a_node_that_died_is_leased_no_more_and_a_new_one_wakes_who_waits() -> None:
    leases, woken = GpuLeases(places(TWO, ())), []
    cards = Cards(leases, Log(io.StringIO()))

    def take(owner: str, count: int) -> tuple[str, ...]:
        return cards.take(owner, count, {}, (), lambda: woken.append(owner)).devices

    assert take("m-0", 1) == ("a/0",)
    cards.renew(places(TWO[1:], {"a/0"}))
    assert leases.holders["m-0"] == ("a/0",), "it is its owner's until that is known to have ended"
    assert take("m-0", 1) == ("b/0",), "who starts again is not sent there"
    with pytest.raises(NoGpuError):
        take("m-1", 4)
    cards.renew(places((*TWO[1:], Node("c", 8, 8)), {"b/0"}))
    assert not woken, "not before whoever tells of them is done"
    await asyncio.sleep(0)
    assert woken == ["m-1"]
    assert take("m-1", 4)[0] == "c/0"


def claim(pool: str, gpus_each: int, *holders: Holder, **more: Any) -> Claim:
    way = WayUp(replica_id=None, rung=Rung.COLD, up_s=10.0)
    return Claim(pool=pool, gpus_each=gpus_each, holders=holders, ways_up=(way,), **more)


def worker(number: int, *devices: str) -> Holder:
    return Holder(replica_id=f"jobs-{number}", rung=Rung.AWAKE, devices=devices, from_nothing=True)


def test_offline_work_yields_to_who_is_online_and_on_one_node_to_a_group() -> None:
    gpus = places((Node("a", 2, 2), Node("b", 2, 2)), ()).gpus
    room = Room(gpus=gpus)
    workers = [worker(n, gpu.device) for n, gpu in enumerate(gpus)]
    jobs = claim("jobs", 1, *workers, desired=4, work_class="offline")
    verdict = arbitrate([jobs, claim("chat", 1, desired=1)], room)
    (low,) = (move for move in verdict.moves if isinstance(move, Lower))
    assert (low.pool, low.rung) == ("jobs", Rung.COLD)
    assert any(isinstance(move, Wait) and move.pool == "chat" for move in verdict.moves)

    verdict = arbitrate([jobs, claim("large", 2, desired=1)], room)
    lowered = {move.replica_id for move in verdict.moves if isinstance(move, Lower)}
    assert lowered in ({"jobs-0", "jobs-1"}, {"jobs-2", "jobs-3"})

    free = Room(gpus=gpus, free=frozenset({"a/1", "b/0", "b/1"}))
    (up,) = arbitrate([claim("large", 2, desired=1)], free).moves
    assert isinstance(up, Raise)
    assert up.devices == ("b/0", "b/1")


def test_no_more_replicas_are_wanted_than_the_nodes_can_hold() -> None:
    gpus = places((Node("a", 3, 3), Node("b", 3, 3)), ()).gpus
    room = Room(gpus=gpus, free=frozenset(gpu.device for gpu in gpus))
    wide = claim("wide", 2, desired=9)
    assert replicas_possible(wide, [wide], room) == 2
    narrow = claim("narrow", 1, desired=9)
    assert replicas_possible(narrow, [narrow, claim("other", 2, min=1)], room) == 4
    verdict = arbitrate([wide], room)
    assert sum(isinstance(move, Raise) for move in verdict.moves) == 2
    assert verdict.refused


def test_what_is_free_is_believed_when_two_looks_agree() -> None:
    told = (Node("a", 2, 2), Node("b", 4, 4))
    less = (Node("a", 2, 1), Node("b", 4, 4))
    assert believed(told, told, less) == told
    assert believed(told, less, less) == less
    assert believed(told, told, told[:1]) == told[:1], "a node that is gone is gone at once"
    more = (*told, Node("c", 8, 8))
    assert believed(told, told, more) == more, "of a new one there is nothing better to say"


RAYS = [
    {
        "NodeID": "n1",
        "Alive": True,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"GPU": 4.0, "CPU": 8.0, "node:10.0.0.1": 1.0, "accelerator_type:H100": 1.0},
    },
    {
        "NodeID": "n2",
        "Alive": False,
        "NodeManagerAddress": "10.0.0.2",
        "Resources": {"GPU": 8.0},
    },
    {"NodeID": "n3", "Alive": True, "NodeManagerAddress": "10.0.0.3", "Resources": {"CPU": 1.0}},
]


def group(name: str, bundle: dict[str, float], state: str = "CREATED") -> dict[str, Any]:
    return {"name": name, "state": state, "bundles": {0: bundle}}


def test_free_gpus_and_leased_ones_are_ours_and_nobody_elses() -> None:
    ours = Need(1, {}, "10.0.0.1").bundle
    groups = [
        group("ns/doherty-x", ours),
        group("ns/doherty-y", ours, "PENDING"),
        group("other/doherty-z", ours),  # of another manager's namespace
        group("ns/doherty-w", {"GPU": 1.0, "CPU": 8.0}),  # ours, without a lease
    ]
    nodes = nodes_of(RAYS, {"n1": {"GPU": 1.0}}, groups, "ns")
    assert nodes == (Node("10.0.0.1", 4, 2, "H100"), Node("10.0.0.3", 0, 0))
    assert nodes_of(RAYS[:1], {"n1": {}}, (), "ns") == (Node("10.0.0.1", 4, 0, "H100"),)


def test_the_bundle_of_a_lease_names_its_node() -> None:
    need = Need(2, {}, "10.0.0.1")
    assert need.bundle == {"GPU": 2.0, "node:10.0.0.1": 0.001}
    assert waits_for(need, [], {}) == "waits for 2 GPUs on node 10.0.0.1 of the cluster"
