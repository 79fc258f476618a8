"""Which class a request is of: by its own word, else by its pool's."""

from __future__ import annotations

import json

import pytest

from proxy.contract import PoolRecord
from proxy.core.asked import read_body
from proxy.core.classes import (
    NAMES,
    OFFLINE,
    ONLINE,
    PATIENCE,
    SEMI_ONLINE,
    SHARES,
    UNSAID,
    YIELD_S,
    class_named,
)
from proxy.core.preamble import read_preamble
from proxy.core.prospects import UNSCALED, prospects_of
from proxy.core.routes import find_route

_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: p"


@pytest.mark.parametrize(
    ("named", "due", "spare"),
    [
        ("online", ONLINE, False),
        ("semi-online", SEMI_ONLINE, False),
        ("offline", OFFLINE, False),
        ("spare", OFFLINE, True),
        ("Spare", UNSAID, False),
        ("spare, online", UNSAID, False),
        ("", UNSAID, False),
    ],
)
def test_the_field_of_a_head_says_it_and_goes_no_further(named: str, due: int, spare: bool) -> None:
    head = read_preamble(_HEAD + b"\r\nx-doherty-class: " + named.encode())
    route = find_route(b"POST", b"/v1/chat/completions")
    request = read_body(route, head, b'{"model":"m","messages":[]}').request
    assert (request.work_class, request.spare) == (due, spare)
    assert b"x-doherty" not in head.upstream_head(b"host: r\r\n", b"id", 2)


def test_the_field_outweighs_the_tier() -> None:
    head = read_preamble(_HEAD + b"\r\nx-doherty-class: spare")
    body = b'{"model":"m","service_tier":"priority","messages":[]}'
    request = read_body(find_route(b"POST", b"/v1/chat/completions"), head, body).request
    assert (request.work_class, request.spare) == (OFFLINE, True)


@pytest.mark.parametrize(
    ("tier", "due"),
    [
        ("priority", ONLINE),
        ("fast", ONLINE),
        ("ultrafast", ONLINE),
        ("scale", ONLINE),
        ("flex", OFFLINE),
        ("auto", UNSAID),
        ("default", UNSAID),
        (None, UNSAID),
    ],
)
def test_a_request_says_its_class_by_its_tier(tier: str | None, due: int) -> None:
    fields = {} if tier is None else {"service_tier": tier}
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    preamble = read_preamble(_HEAD)
    asked = read_body(find_route(b"POST", preamble.path), preamble, body)
    assert asked.request.work_class == due


def test_classes_are_named_as_pools_name_them_and_unknown_ones_are_online() -> None:
    assert [class_named(name) for name in NAMES] == [ONLINE, SEMI_ONLINE, OFFLINE]
    assert class_named("of a later release") == ONLINE


def test_the_less_urgent_has_less_room_yields_longer_and_is_more_patient() -> None:
    assert list(SHARES) == sorted(SHARES, reverse=True)
    assert list(YIELD_S) == sorted(YIELD_S)
    assert list(PATIENCE) == sorted(PATIENCE)


# --- what pools promise -----------------------------------------------------------------------


def test_the_prospect_of_a_model_is_that_of_all_its_pools() -> None:
    records = (
        PoolRecord(model="m", pool="a", work_class="offline", awake=1, coming=1, ready_in_s=9.0),
        PoolRecord(model="m", pool="b", wakes=True, coming=2, ready_in_s=4.0, start_s=30.0),
    )
    found = prospects_of(records, {})["m"]
    assert (found.name, found.work_class, found.wakes) == ("m", ONLINE, True)
    assert (found.awake, found.coming, found.ready_in_s, found.start_s) == (1, 3, 4.0, 30.0)


def test_a_pool_that_is_told_of_by_each_of_its_names_counts_once_for_each() -> None:
    records = tuple(PoolRecord(model=name, pool="a", coming=1) for name in ("m", "sql"))
    found = prospects_of(records, {"m": frozenset("a"), "sql": frozenset("a")})
    assert {name: (one.name, one.coming) for name, one in found.items()} == {
        "m": ("m", 1),
        "sql": ("sql", 1),
    }


def test_a_name_that_only_replicas_tell_is_counted_as_its_pools_model() -> None:
    found = prospects_of((PoolRecord(model="m", pool="a", wakes=True),), {"sql": frozenset("a")})
    assert (found["sql"].name, found["sql"].wakes) == ("m", True)
    assert "other" not in found
    assert not UNSCALED.wakes
