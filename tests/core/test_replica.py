"""One replica: which URLs are understood, and what makes it available."""

from __future__ import annotations

from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import PoolConfig
from proxy.contract import (
    DP_SIZE_MAX,
    WEIGHT_MAX,
    WEIGHT_MIN,
    LoadSample,
    RankLoad,
    ReplicaState,
)
from proxy.core.replica import parse_url, replica_of, replicas_of
from tests.core.builders import record, replica


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("http://127.0.0.1:30000", (False, "127.0.0.1", 30000)),
        ("http://127.0.0.1:30000/", (False, "127.0.0.1", 30000)),
        ("https://engine.example", (True, "engine.example", 443)),
        ("http://engine", (False, "engine", 80)),
        ("http://[::1]:8000", (False, "::1", 8000)),
        ("http://a:65535", (False, "a", 65535)),
    ],
)
def test_urls(url: str, parsed: tuple[bool, str, int]) -> None:
    assert parse_url(url) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "", "a:1", "//a:1", "ftp://a:1", "http://", "http://:1", "http://a:0", "http://a:65536",
        "http://a:123456", "http://a:x", "http://u@a:1", "http://u:p@a:1", "http://a:1/v1",
        "http://a:1?x", "http://a:1#x", "http://a b:1", "http://a:1\n", "http://-a:1",
        "http://a_b:1", "http://[::1", "http://[x]:1", "HTTP://a:1", "http://a:1//", "http://é:1",
        "http://a:\u0661",
    ],
)  # fmt: skip
def test_what_is_no_replica_url(url: str) -> None:
    with pytest.raises(ValueError, match="replica URL"):
        parse_url(url)


@given(st.text(max_size=30) | st.text(max_size=20).map("http://".__add__))
def test_a_url_is_understood_or_refused_with_its_text(url: str) -> None:
    try:
        _, host, port = parse_url(url)
    except ValueError as error:
        said = str(error)
    else:
        said = repr(url)
        assert host in url
        assert 0 < port < 65536
    assert repr(url) in said


def test_the_host_field_is_ready_to_send() -> None:
    assert replica_of(record("a")).host_field == b"host: 127.0.0.1:30000\r\n"
    ipv6 = replica_of(record("a", url="http://[::1]:8000"))
    assert (ipv6.host, ipv6.host_field) == ("::1", b"host: [::1]:8000\r\n")


def test_a_record_becomes_a_replica() -> None:
    load = LoadSample(at_s=1.0, kv_capacity_tokens=5000)
    made = replica_of(
        record("a", "m", "n", pool="p", region="eu", engine="vllm", max_inputs=3, restarts=2,
               load=load)
    )  # fmt: skip
    assert made.models == frozenset("mn")
    assert (made.pool, made.region, made.engine) == ("p", "eu", "vllm")
    assert (made.max_inputs, made.restarts, made.kv_capacity_tokens) == (3, 2, 5000)
    assert replica_of(record("a")).kv_capacity_tokens == 0


def test_a_server_with_one_rank_is_one_replica() -> None:
    for size in (-1, 0, 1):
        (only,) = replicas_of(record("a", dp_size=size))
        assert (only.name, only.replica_id, only.dp_rank) == ("a", "a", None)
        assert only == replica_of(record("a"))


def test_each_rank_of_a_server_is_a_replica() -> None:
    told = tuple(
        RankLoad(rank=rank, running=rank + 1, kv_capacity_tokens=1000 + rank, waiting_tokens=7)
        for rank in range(3)
    )
    load = LoadSample(at_s=9.0, running=6, kv_capacity_tokens=3003, ranks=told)
    ranks = replicas_of(record("a", "m", dp_size=3, load=load, max_inputs=10))
    assert [(r.name, r.replica_id, r.dp_rank) for r in ranks] == [
        ("a/0", "a", 0),
        ("a/1", "a", 1),
        ("a/2", "a", 2),
    ]
    assert [r.kv_capacity_tokens for r in ranks] == [1000, 1001, 1002]
    assert {r.max_inputs for r in ranks} == {4}
    assert ranks[1].host_field == b"host: 127.0.0.1:30000\r\nx-data-parallel-rank: 1\r\n"
    assert ranks[1].load == LoadSample(
        at_s=9.0, running=2, kv_capacity_tokens=1001, waiting_tokens=7
    )


def test_ranks_whose_figures_are_not_told_apart_share_evenly() -> None:
    load = LoadSample(at_s=9.0, running=6, kv_capacity_tokens=3000)
    ranks = replicas_of(record("a", dp_size=3, load=load))
    assert [(r.kv_capacity_tokens, r.load) for r in ranks] == [(1000, None)] * 3
    assert {r.max_inputs for r in ranks} == {0}, "no limit stays none"
    _, second = replicas_of(record("a", dp_size=2))
    assert (second.kv_capacity_tokens, second.load) == (0, None)


def test_ranks_are_bounded() -> None:
    assert len(replicas_of(record("a", dp_size=10**9))) == DP_SIZE_MAX


def test_adapters_may_be_unknown() -> None:
    assert replica_of(record("a")).adapters is None
    assert replica_of(record("a", adapters=())).adapters == frozenset()
    assert replica_of(record("a", adapters=("x", "y"))).adapters == frozenset("xy")


def test_who_sleeps_takes_no_requests() -> None:
    assert not replica_of(record("a", asleep=True)).available


@pytest.mark.parametrize("state", list(ReplicaState))
@pytest.mark.parametrize("suspect", [False, True])
def test_only_ready_and_unsuspected_takes_requests(state: ReplicaState, suspect: bool) -> None:
    expected = state is ReplicaState.READY and not suspect
    assert replica("a", state=state, suspect=suspect).available is expected


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.009, 10.5, float("inf"), float("nan")])
def test_a_weight_that_no_ring_can_honour_is_refused_with_a_reason(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight .* is not between 0.01 and 10"):
        replica_of(record("a", weight=weight))


def test_the_weights_that_a_manager_may_give_are_those_that_a_proxy_takes() -> None:
    (bounds,) = get_type_hints(PoolConfig, include_extras=True)["weight"].__metadata__
    assert (bounds.ge, bounds.le) == (WEIGHT_MIN, WEIGHT_MAX)
