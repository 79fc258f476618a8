"""The session key: which words count, in which order, and what never does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.http1 import parse_request_head
from proxy.core.scan import Scanned, scan_body
from proxy.core.session import response_key, session_of_body, session_of_head

_IN_ORDER = (
    "x-doherty-routing-key",
    "x-session-id",
    "x-session-affinity",
    "x-claude-code-session-id",
    "session-id",
    "x-parent-session-id",
    "x-dynamo-session-id",
    "x-smg-routing-key",
)


def _key(fields: list[tuple[str, str]], scanned: Scanned | None = None) -> bytes | None:
    lines = ["POST / HTTP/1.1", "Host: a", *(f"{name}: {value}" for name, value in fields)]
    of_head = session_of_head(parse_request_head("\r\n".join(lines).encode()))
    return of_head or (session_of_body(scanned) if scanned is not None else None)


def _body(**fields: object) -> Scanned:
    return scan_body(json.dumps({"model": "m", **fields}).encode())


@given(st.permutations(_IN_ORDER), st.integers(1, len(_IN_ORDER)))
def test_the_first_in_rank_wins_wherever_it_stands(order: list[str], count: int) -> None:
    present = order[:count]
    winner = min(present, key=_IN_ORDER.index)
    fields = [(name, f"value of {name}") for name in present]
    assert _key(fields, _body(prompt_cache_key="p")) == f"value of {winner}".encode()


@pytest.mark.parametrize(
    "name", ["X-Session-ID", "x_session_id", "XSESSIONID", "x-session_Id", "Session_ID"]
)
def test_names_are_compared_without_case_and_hyphens(name: str) -> None:
    assert _key([(name, "k")]) == b"k"


@pytest.mark.parametrize(
    "name",
    ["x-request-id", "x-correlation-id", "traceparent", "x-session", "my-session-id", "routing"],
)
def test_other_ids_are_no_session(name: str) -> None:
    assert _key([(name, "k")]) is None


def test_the_first_of_two_equal_names_counts() -> None:
    assert _key([("x-session-id", "a"), ("x-session-id", "b")]) == b"a"


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, None),
        ({"prompt_cache_key": "p"}, b"p"),
        ({"session_id": "s"}, b"s"),
        ({"prompt_cache_key": "p", "session_id": "s"}, b"p"),
        ({"prompt_cache_key": "", "session_id": "s"}, b"s"),
        ({"prompt_cache_key": "p" * 256, "session_id": "s"}, b"s"),
        ({"prompt_cache_key": "p" * 255}, b"p" * 255),
        ({"session_id": "é"}, "é".encode()),
        ({"session_id": 7}, None),
        ({"session_params": {"id": "i"}}, b"i"),
        ({"session_id": 7, "session_params": {"id": "i", "rid": None}}, b"i"),
        ({"session_id": "s", "session_params": {"id": "i"}}, b"s"),
        ({"session_params": {"id": "i" * 256}}, None),
        ({"session_params": []}, None),
        ({"user": "u", "safety_identifier": "u", "metadata": {"session_id": "x"}}, None),
    ],
)
def test_the_body_names_a_session(fields: dict[str, object], key: bytes | None) -> None:
    assert _key([], _body(**fields)) == key


def test_too_long_and_empty_keys_are_none() -> None:
    size = limits.SESSION_KEY_BYTES_MAX
    assert _key([("x-session-id", "k" * size)]) == b"k" * size
    assert _key([("x-session-id", "k" * (size + 1)), ("session-id", "s")]) == b"s"
    assert _key([("x-session-id", ""), ("x-dynamo-session-id", "d")]) == b"d"


def test_a_response_is_known_by_its_id() -> None:
    assert response_key(b"") == 0
    assert 0 < response_key(b"resp_1") != response_key(b"resp_2") < 1 << 64


def test_without_a_body_only_heads_count() -> None:
    assert _key([]) is None
    assert _key([("session-id", "s")]) == b"s"
