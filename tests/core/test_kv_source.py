"""Where events are, as the engines say it, and what a numbered batch is to the story so far."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.core.kv_source import (
    KvSequence,
    KvSource,
    Verdict,
    listed_source,
    named_source,
    seen_from_here,
)


def listed(**entries: Any) -> bytes:
    return json.dumps(
        {name.removeprefix("rank"): entry for name, entry in entries.items()}
    ).encode()


ONE = {"publisher": "zmq", "endpoint": "tcp://10.0.0.9:5557", "topic": "kv"}
TWO = {"endpoint": "tcp://*:5558", "replay_endpoint": "tcp://[::]:5600", "topic": None}


@pytest.mark.parametrize(
    ("body", "rank", "source"),
    [
        (listed(rank0=ONE), None, KvSource("tcp://10.0.0.9:5557", "", "kv")),
        (listed(rank0=ONE), 0, KvSource("tcp://10.0.0.9:5557", "", "kv")),
        (listed(rank0=ONE, rank1=TWO), 1, KvSource("tcp://h:5558", "tcp://h:5600", "")),
        (listed(rank0=ONE, rank1=TWO), None, None),  # several caches, and one name
        (listed(rank0=ONE), 3, None),
        (listed(), None, None),
    ],
)
def test_vllm_lists_its_sources(body: bytes, rank: int | None, source: KvSource | None) -> None:
    assert listed_source(body, "h", rank) == source


def named(**fields: Any) -> bytes:
    return json.dumps({"page_size": 16, "kv_events": fields or None}).encode()


@pytest.mark.parametrize(
    ("body", "rank", "source"),
    [
        (named(), None, None),
        (named(endpoint_port_base=5557, dp_size=2), None, None),  # several caches, and one name
        (named(endpoint_port_base=5557), None, KvSource("tcp://h:5557", "", "")),
        (
            named(endpoint_host="0.0.0.0", endpoint_port_base=5557, topic="t",
                  replay_endpoint_port_base=5657),
            2,
            KvSource("tcp://h:5559", "tcp://h:5659", "t"),
        ),
        (named(endpoint_host="fe80::1", endpoint_port_base=1), 0,
         KvSource("tcp://[fe80::1]:1", "", "")),
    ],
)  # fmt: skip
def test_sglang_names_ports(body: bytes, rank: int | None, source: KvSource | None) -> None:
    assert named_source(body, "h", rank) == source


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"0": 5}', b'{"0": {"topic": "t"}}'])
def test_no_list_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ValueError, match="no list of KV event sources"):
        listed_source(body, "h", None)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"kv_events": 5}', b'{"kv_events": {}}'])
def test_no_server_info_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ValueError, match="no server info"):
        named_source(body, "h", None)


@pytest.mark.parametrize(
    ("endpoint", "host", "seen"),
    [
        ("tcp://*:5557", "h", "tcp://h:5558"),
        ("tcp://0.0.0.0:5557", "10.1.1.1", "tcp://10.1.1.1:5558"),
        ("tcp://[::]:5557", "fe80::2", "tcp://[fe80::2]:5558"),
        ("tcp://127.0.0.1:5557", "10.1.1.1", "tcp://10.1.1.1:5558"),
        ("tcp://localhost:5557", "h", "tcp://h:5558"),
        ("tcp://gpu-7.cluster:5557", "h", "tcp://gpu-7.cluster:5558"),
    ],
)
def test_an_address_is_as_it_is_from_here(endpoint: str, host: str, seen: str) -> None:
    assert seen_from_here(endpoint, host, 1) == seen


@pytest.mark.parametrize(
    "endpoint",
    ["", "ipc:///tmp/kv", "inproc://kv", "tcp://h", "tcp://h:0", "tcp://h:65536", "tcp://h:99999",
     "tcp://h:1/x", "tcp://a b:1", "udp://h:1"],
)  # fmt: skip
def test_what_is_no_address_is_not_followed(endpoint: str) -> None:
    with pytest.raises(ValueError, match="cannot be followed"):
        seen_from_here(endpoint, "h")


def after(number: int, at_s: float) -> KvSequence:
    sequence = KvSequence()
    sequence.take(number, at_s)
    return sequence


def test_any_number_begins_a_story() -> None:
    assert KvSequence().judge(7, 1.0) is Verdict.NEXT
    assert KvSequence().replay_from == 0
    nothing = KvSequence()
    nothing.begin_at_nothing()
    assert nothing.judge(0, 1.0) is Verdict.NEXT
    assert nothing.judge(1, 1.0) is Verdict.GAP


@pytest.mark.parametrize(
    ("number", "at_s", "verdict"),
    [
        (6, 2.0, Verdict.NEXT),
        (7, 2.0, Verdict.GAP),
        (5, 1.0, Verdict.REPEATED),
        (3, 0.5, Verdict.REPEATED),
        (5, 2.0, Verdict.RESTARTED),
        (0, 2.0, Verdict.RESTARTED),
    ],
)
def test_what_is_published(number: int, at_s: float, verdict: Verdict) -> None:
    assert after(5, 1.0).judge(number, at_s) is verdict


@pytest.mark.parametrize(
    ("number", "at_s", "verdict"),
    [
        (5, 1.0, Verdict.REPEATED),
        (5, 2.0, Verdict.RESTARTED),  # another batch has this number now
        (6, 2.0, Verdict.GAP),  # ours is not kept any more, so it may be another story
        (4, 1.0, Verdict.REPEATED),
    ],
)
def test_what_a_replay_begins_with(number: int, at_s: float, verdict: Verdict) -> None:
    sequence = after(5, 1.0)
    assert sequence.replay_from == 5
    assert sequence.judge_first_replayed(number, at_s) is verdict
    assert KvSequence().judge_first_replayed(number, at_s) is Verdict.NEXT
