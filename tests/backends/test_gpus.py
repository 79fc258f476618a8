"""Leases of GPUs: which cards, and what is said when there are none."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.gpus import (
    Gpu,
    GpuInventory,
    GpuLeases,
    Lease,
    NoGpuError,
    bound_to_node,
    choose,
    described,
    pinned,
)


def machine(groups: str, nodes: str, names: str = "") -> GpuInventory:
    """Write a machine down by card: NVLink group (`.` for none), NUMA node, letter of the model."""
    gpus = tuple(
        Gpu(
            device=str(index),
            uuid=f"GPU-{index}",
            name=names[index] if names else "H",
            numa_node=int(node),
            nvlink_group=None if group == "." else int(group),
        )
        for index, (group, node) in enumerate(zip(groups, nodes, strict=True))
    )
    several = frozenset(map(int, nodes)) if len(set(nodes)) > 1 else frozenset()
    return GpuInventory(gpus, several)


SWITCHED = machine("00000000", "00001111")  # eight behind NVSwitch, two sockets
PAIRS = machine("0011", "0000")
PCIE = machine("....", "0011")
BRIDGED = machine("00112233", "00001111")  # pairs by bridge, two sockets
TWELVE = machine("001122334455", "000000111111")

PLACES = [
    ("one card, the lowest", SWITCHED, "", 1, "0"),
    ("the socket with least room, so that four stay together", SWITCHED, "0", 1, "1"),
    ("four of the socket that has four", SWITCHED, "0", 4, "4567"),
    ("five: across sockets, over NVLink all the same", SWITCHED, "", 5, "01234"),
    ("six of a socket and a half: the whole one first", SWITCHED, "01", 5, "24567"),
    ("eight", SWITCHED, "", 8, "01234567"),
    ("the broken pair first", PAIRS, "0", 1, "1"),
    ("a whole pair", PAIRS, "0", 2, "23"),
    ("three of two pairs: a whole one and one", PAIRS, "", 3, "012"),
    ("PCIe: next to the same memory", PCIE, "0", 2, "23"),
    ("PCIe: across sockets when nothing else is left", PCIE, "02", 2, "13"),
    ("PCIe: the half that is broken already", PCIE, "3", 1, "2"),
    ("bridges: two pairs of one socket", BRIDGED, "0", 4, "4567"),
    ("bridges: a pair before two halves", BRIDGED, "03", 2, "45"),
    ("bridges: six are three pairs", BRIDGED, "0", 6, "234567"),
    ("the tighter socket, though its pairs are whole", BRIDGED, "02", 3, "456"),
    ("the tighter socket, though the other begins with half a pair", TWELVE, "089", 3, "6710"),
    ("mixed cards: two of one model", machine("....", "0000", "ABAB"), "", 2, "02"),
    ("mixed cards: the rarer model first", machine("...", "000", "AAB"), "", 1, "2"),
]


@pytest.mark.parametrize(
    ("inventory", "taken", "count", "given"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES]
)
def test_which_cards(inventory: GpuInventory, taken: str, count: int, given: str) -> None:
    leases = GpuLeases(inventory)
    if taken:
        leases.claim("before", taken)
    assert "".join(leases.lease("m-0", count).devices) == given


def test_mixed_cards_are_never_one_lease() -> None:
    assert choose(machine("00", "00", "AB").gpus, 2) is None


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=30),
    st.sampled_from([SWITCHED, PAIRS, PCIE, BRIDGED]),
)
def test_no_card_has_two_owners_and_only_too_few_are_refused(
    wishes: list[tuple[int, int]], inventory: GpuInventory
) -> None:
    leases = GpuLeases(inventory)
    for owner, count in wishes:
        others = sum(len(d) for name, d in leases.holders.items() if name != str(owner))
        try:
            given_now = leases.lease(str(owner), count).devices
        except NoGpuError:
            assert count > len(inventory.gpus) - others
            assert str(owner) not in leases.holders
        else:
            assert len(given_now) == count
        held = list(itertools.chain.from_iterable(leases.holders.values()))
        assert len(held) == len(set(held))


@given(st.randoms(use_true_random=False))
def test_the_same_wishes_give_the_same_cards(seed: random.Random) -> None:
    counts = [seed.randint(0, 3) for _ in range(6)]

    def give() -> list[object]:
        leases = GpuLeases(BRIDGED)
        given_now: list[object] = []
        for index, count in enumerate(counts):
            try:
                given_now.append(leases.lease(f"m-{index}", count))
            except NoGpuError as error:
                given_now.append(str(error))
        return given_now

    assert give() == give()


def test_a_lease_is_kept_over_a_restart_and_changed_with_its_size() -> None:
    leases = GpuLeases(SWITCHED)
    first = leases.lease("m-0", 2)
    leases.lease("m-1", 1)
    assert leases.lease("m-0", 2) == first
    assert leases.lease("m-0", 4).devices == ("4", "5", "6", "7")
    assert leases.release("m-0")
    assert not leases.release("m-0")
    assert leases.lease("m-2", 0) == Lease()
    assert leases.holders == {"m-1": ("2",)}


def test_a_claim_is_a_fact_and_a_lease_keeps_clear_of_it() -> None:
    cards = (Gpu(device="0", uuid="GPU-8932f937-7d72", numa_node=0), Gpu(device="1", numa_node=1))
    leases = GpuLeases(GpuInventory(cards, frozenset({0, 1})))
    assert leases.claim("old-0", ["GPU-8932f937"]).devices == ("0",), "a UUID cut short"
    assert leases.claim("old-0", ["GPU-8932f937-7d72"]).devices == ("0",), "known by its UUID, too"
    assert leases.claim("old-1", ["0"]).devices == ("0",), "two that run there run there"
    assert leases.lease("m-0", 1) == Lease(("1",), 1)
    leases.release("old-0")
    with pytest.raises(NoGpuError):
        leases.lease("m-1", 1)
    leases.release("old-1")
    assert leases.lease("m-1", 1).devices == ("0",)
    assert leases.claim("else", ["MIG-7"]).devices == ("MIG-7",), "of a list we do not know"


REFUSALS = [
    (
        "all taken",
        {"m-0": "01", "m-1": "2", "m-2": "3"},
        1,
        "it needs 1 GPU and none is free (m-0 has GPUs 0, 1; m-1 has GPU 2; m-2 has GPU 3); "
        "it starts when enough are given back: stop one of these, lower the replicas of a pool, or "
        "let pools share a card by CUDA_VISIBLE_DEVICES in their env",
    ),
    ("some taken", {"m-0": "01"}, 3, "it needs 3 GPUs and GPUs 2, 3 are free (m-0 has GPUs 0, 1)"),
    ("one left", {"m-0": "012"}, 2, "it needs 2 GPUs and GPU 3 is free (m-0 has GPUs 0, 1, 2)"),
    (
        "never enough",
        {},
        8,
        "it needs 8 GPUs and this machine has 4 for it; lower the parallelism in the pool's args, "
        "or its gpus, or name more in manager.gpus",
    ),
]


@pytest.mark.parametrize(
    ("held", "count", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_a_refusal_says_who_has_what(held: dict[str, str], count: int, words: str) -> None:
    leases = GpuLeases(PAIRS)
    for owner, devices in held.items():
        leases.claim(owner, devices)
    with pytest.raises(NoGpuError) as refusal:
        leases.lease("m-9", count)
    assert str(refusal.value).startswith(words)


def test_a_refusal_for_mixed_cards_and_for_none() -> None:
    with pytest.raises(NoGpuError, match="3 GPUs of one model and this machine has 2 for it"):
        GpuLeases(machine("....", "0000", "AABB")).lease("m-0", 3)
    with pytest.raises(NoGpuError, match="needs 1 GPU and this machine has 0"):
        GpuLeases(GpuInventory(())).lease("m-0", 1)


def test_what_the_engine_is_told() -> None:
    assert Lease(("2", "3")).environment == {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert Lease().environment == {}


PINS = [
    ("nothing", {}, "--tp 2", None),
    ("the environment", {"CUDA_VISIBLE_DEVICES": " 0, GPU-1,"}, "", ("0", "GPU-1")),
    ("no card at all", {"CUDA_VISIBLE_DEVICES": ""}, "--device-ids 1", ()),
    ("vLLM's list", {}, "--device-ids 2,3 --tp 2", ("2", "3")),
    ("vLLM's list, joined", {}, "--device-ids=2,3", ("2", "3")),
    ("SGLang's first", {}, "--base-gpu-id 4", ("4", "5")),
    ("SGLang's first and step", {}, "--base-gpu-id=1 --gpu-id-step 2", ("1", "3")),
    ("no arguments", {}, "", None),
    ("what is no number", {}, "--base-gpu-id x", None),
    ("a flag without a value", {}, "--tp 2 --base-gpu-id", None),
]


@pytest.mark.parametrize(("env", "args", "cards"), [p[1:] for p in PINS], ids=[p[0] for p in PINS])
def test_pools_that_name_their_cards(
    env: dict[str, str], args: str, cards: tuple[str, ...] | None
) -> None:
    assert pinned(env, args.split(), 2) == cards


NODES = [
    ("all on one of two nodes", SWITCHED, "4567", 1),
    ("on both", SWITCHED, "34", None),
    ("the only node", PAIRS, "01", None),
    ("a node that nobody may bind to", GpuInventory(SWITCHED.gpus), "01", None),
    ("a card that nobody listed", SWITCHED, "9", None),
]


@pytest.mark.parametrize(
    ("inventory", "devices", "node"), [n[1:] for n in NODES], ids=[n[0] for n in NODES]
)
def test_the_node_of_a_lease(inventory: GpuInventory, devices: str, node: int | None) -> None:
    assert GpuLeases(inventory).claim("m-0", devices).numa_node == node


def test_a_card_in_words() -> None:
    gpu = SWITCHED.gpus[5]
    assert described(gpu) == "5: H, NUMA node 1, NVLink group 0"
    assert described(Gpu(device="0", memory_mib=81_920, used_mib=4)) == "0: 4 of 81,920 MiB used"
    assert described(Gpu(device="0")) == "0: nothing known"


def test_binding_to_a_node() -> None:
    lease = Lease(("4",), 1)
    prefix = ("numactl", "--cpunodebind=1", "--preferred=1")
    assert bound_to_node(lease, ("--tp", "1")) == prefix
    assert bound_to_node(lease, ("--numa-bind",)) == ()
    assert bound_to_node(lease, ("--numa-node=0",)) == ()
    assert bound_to_node(Lease(("4",)), ()) == ()
