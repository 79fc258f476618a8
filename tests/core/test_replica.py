"""One replica: which URLs are understood, and what makes it available."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import LoadSample, ReplicaState
from proxy.core.replica import parse_url, replica_of
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


@pytest.mark.parametrize("state", list(ReplicaState))
@pytest.mark.parametrize("suspect", [False, True])
def test_only_ready_and_unsuspected_takes_requests(state: ReplicaState, suspect: bool) -> None:
    expected = state is ReplicaState.READY and not suspect
    assert replica("a", state=state, suspect=suspect).available is expected
