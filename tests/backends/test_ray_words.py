"""What is told of a cluster, in words."""

from __future__ import annotations

import pytest

from backends.providers.ray_words import Need, one_line, unplaced_words, waits_for

NODES = [{"GPU": 4.0, "CPU": 8.0}, {"GPU": 2.0, "CPU": 64.0, "accelerator_type:H200": 1.0}]


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Need(2), "waits for 2 GPUs on one node of the cluster; free on all: 1 GPUs"),
        (Need(8), "waits for a node with 8 GPUs; the largest has 4"),
        (Need(1, {"CPU": 96}), "waits for a node with 96 CPUs; the largest has 64"),
        (
            Need(1, {"accelerator_type:B200": 0.001}),
            "waits for a node with 0.001 accelerator_type:B200; the largest has 0",
        ),
        (
            Need(0, {"CPU": 1}),
            "waits for 1 CPU on one node of the cluster; free on all: 0 CPUs",
        ),
    ],
)
def test_what_is_waited_for_is_told_with_what_there_is(need: Need, words: str) -> None:
    assert waits_for(need, NODES, {"GPU": 1.0}) == words


def test_nothing_is_known_of_a_cluster_without_nodes() -> None:
    assert waits_for(Need(1), [], {}) == "waits for a node with 1 GPU; the largest has 0"


@pytest.mark.parametrize(
    ("need", "bundle"),
    [
        (Need(), {"CPU": 1.0}),
        (Need(2), {"GPU": 2.0}),
        (Need(2, {"CPU": 8}), {"GPU": 2.0, "CPU": 8}),
        (Need(0, {"CPU": 0.5}), {"CPU": 0.5}),
    ],
)
def test_a_bundle_is_never_empty(need: Need, bundle: dict[str, float]) -> None:
    assert need.bundle == bundle


def test_an_error_of_ray_is_told_by_its_first_line() -> None:
    assert one_line(RuntimeError("\n  gone  \nTraceback\n")) == "gone"
    assert one_line(RuntimeError("")) == "RuntimeError"
    assert one_line(RuntimeError("failed:\nTraceback\nno memory\n")) == "failed: no memory"
    assert unplaced_words(15) == "ended by SIGTERM before a node had room for it"
