"""Tenants share no cached prefix in an engine either: what one has sent helps no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import aiohttp
import pytest

from proxy.config_access import AccessConfig, TenantConfig
from proxy.contract import ReplicaRecord
from proxy.contract.keys import KeyRecord, KeySet
from tests.fakes.plane import CHAT_BODY, Bench, RealPlane, answer, chat_request, records
from tests.fakes.simulator import simulator

MakeBench = Callable[..., Bench]


async def _cached(session: aiohttp.ClientSession, port: int, key: str, **more: Any) -> int:
    """Ask for one and the same prompt; return how many of its tokens the engine had cached."""
    messages = [{"role": "user", "content": "the same words " * 60}]
    ask = {"model": "demo", "messages": messages, "max_tokens": 1, **more}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = {"authorization": f"Bearer {key}"}
    async with session.post(url, json=ask, headers=headers) as response:
        assert response.status == 200
        usage = (await response.json())["usage"]
        details = usage["prompt_tokens_details"]  # SGLang says null for none
        return int(details["cached_tokens"]) if details else 0


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_the_same_prompt_is_cached_for_its_tenant_and_computed_for_others(
    dialect: str,
) -> None:
    async with (
        simulator(dialect=dialect) as engine,
        aiohttp.ClientSession() as session,
    ):
        record = ReplicaRecord(replica_id="a", url=engine.url, models=("demo",))
        async with RealPlane([record], tenant_isolation=True) as proxy:
            assert await _cached(session, proxy.port, "one") == 0
            warm = await _cached(session, proxy.port, "one")
            assert warm > 100
            assert await _cached(session, proxy.port, "two") == 0
            assert await _cached(session, proxy.port, "two") == warm
            assert await _cached(session, proxy.port, "one", cache_salt="own") == 0
            assert await _cached(session, proxy.port, "one", cache_salt="own") == warm
        async with RealPlane([record]) as proxy:
            assert await _cached(session, proxy.port, "one") == 0
            assert await _cached(session, proxy.port, "two") == warm


async def test_the_length_that_is_told_is_that_of_the_body_with_the_salt(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("a"), tenant_isolation=True)
    _, engine = await bench.begun(chat_request(CHAT_BODY + b" \r\n", ("x-api-key: one",)))
    head, _, body = engine.received.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    assert json.loads(body).keys() == json.loads(CHAT_BODY).keys() | {"cache_salt"}


async def test_a_body_goes_as_it_came_where_nothing_has_to_be_added(bench: Bench) -> None:
    _, engine = await bench.begun(chat_request(CHAT_BODY + b" \r\n", ("x-api-key: one",)))
    assert engine.received.endswith(b"\r\n\r\n" + CHAT_BODY + b" \r\n")


async def test_tenants_that_are_set_apart_get_a_salt_of_their_own_and_others_none(
    make_bench: MakeBench,
) -> None:
    tenants = tuple(
        TenantConfig(name=name, cache_isolation=name != "open") for name in ("acme", "zeta", "open")
    )
    keys = [("k1", "acme"), ("k2", "acme"), ("k3", "zeta"), ("k4", "open")]
    told = KeySet(
        version=1,
        salt="drawn once",
        keys=tuple(
            KeyRecord(key_id=key, tenant=tenant, digest=sha256(key.encode()).hexdigest())
            for key, tenant in keys
        ),
    )
    bench = make_bench(records("a"), access=AccessConfig(tenants=tenants))
    bench.plane.know_keys(told)
    salts = {}
    for key, _ in keys:
        bench.clock.advance(1.0)
        _, engine = await bench.begun(chat_request(fields=(f"authorization: Bearer {key}",)))
        sent = json.loads(engine.received.rpartition(b"\r\n\r\n")[2])
        salts[key] = sent.get("cache_salt")
        engine.send(answer())
    assert salts["k1"] == salts["k2"] != salts["k3"]
    assert salts["k4"] is None
    assert {len(salt) for salt in salts.values() if salt} == {64}
