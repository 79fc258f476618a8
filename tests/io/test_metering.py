"""What requests take from their tenant's limits, on every way to their end; and what is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.config_access import AccessConfig, ModelAccess, TenantConfig
from proxy.contract.usage import decode_usage
from proxy.core import quota
from proxy.io.access_log import AccessLog
from tests.fakes.plane import STREAM_HEAD, Bench, answer, chat_request, chunk, records
from tests.io.test_authentication import KEY, KEYS, OTHER, bearer

MakeBench = Callable[..., Bench]
WHO = (bearer(KEY),)
PRICES = {"m": ModelAccess(prompt_price=1.0, cached_price=0.25, completion_price=4.0)}


def body(max_tokens: int | None = 10, *, stream: bool = False, text: str = "hello") -> bytes:
    message = {"role": "user", "content": text}
    more = {} if max_tokens is None else {"max_tokens": max_tokens}
    return json.dumps({"model": "m", "stream": stream, "messages": [message], **more}).encode()


def used(prompt: int, completion: int, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    usage = {
        "prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details,
    }  # fmt: skip
    return json.dumps({"usage": usage}).encode()


@pytest.fixture
def limited(make_bench: MakeBench) -> Callable[..., Bench]:
    def make(config: dict[str, Any] | None = None, **tenant: Any) -> Bench:
        tenants = (TenantConfig(name="acme", **tenant), TenantConfig(name="beta"))
        access = AccessConfig(tenants=tenants, models=PRICES)
        bench = make_bench(records("a", ("m",)), access=access, **(config or {}))
        bench.plane.know_keys(KEYS)
        return bench

    return make


def of(bench: Bench, kind: int) -> int:
    (account,) = bench.plane.metering._accounts.values()
    return account.sum(kind)


def series(bench: Bench, name: str) -> float:
    return sum(s.value for s in bench.plane.counters() if s.name == f"tenant_{name}_total")


async def test_what_was_reserved_is_settled_by_usage(limited: Callable[..., Bench]) -> None:
    bench = limited(tokens_per_min=1000, requests_per_min=10)
    client, engine = await bench.begun(chat_request(body(100), WHO))
    reserved = of(bench, quota.TOKENS)
    assert 100 < reserved < 130
    assert (of(bench, quota.CONCURRENT), of(bench, quota.HELD_TOKENS)) == (1, reserved)
    engine.send(answer(used(12, 30, 4)))
    assert of(bench, quota.TOKENS) == 42
    fields = client.answer().fields
    assert fields["x-ratelimit-limit-tokens"] == "1000"
    assert fields["x-ratelimit-remaining-tokens"] == str(1000 - reserved)
    assert fields["x-ratelimit-limit-requests"] == "10"
    assert fields["x-ratelimit-remaining-requests"] == "9"
    assert fields["x-ratelimit-reset-requests"] == "1m0s"
    assert [series(bench, name) for name in ("requests", "prompt_tokens", "cached_tokens")] == [
        1, 12, 4,
    ]  # fmt: skip
    assert series(bench, "cost") == pytest.approx((8 * 1.0 + 4 * 0.25 + 30 * 4.0) / 1e6)


async def test_who_is_refused_is_told_which_limit_and_when(limited: Callable[..., Bench]) -> None:
    bench = limited(tokens_per_min=150)
    _, engine = await bench.begun(chat_request(body(100), WHO))
    client = bench.client()
    client.send(chat_request(body(100), WHO))
    refused = client.answer()
    assert refused.status == 429
    error = json.loads(refused.body)["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "on tokens per min (tenant acme): Limit 150, Used 1" in error["message"]
    assert 60 <= int(refused.fields["retry-after"]) <= 61
    assert int(refused.fields["retry-after-ms"]) > 59_000
    assert refused.fields["x-should-retry"] == "true"
    assert refused.fields["x-ratelimit-remaining-tokens"] == str(150 - of(bench, quota.TOKENS))
    assert KEY not in str(refused.fields) + refused.body.decode()
    engine.send(answer(used(10, 10)))
    client.send(chat_request(body(100), WHO))
    (await bench.engine()).send(answer(used(10, 100)))
    assert [got.status for got in client.answers("POST", "POST")] == [429, 200]
    assert series(bench, "rate_limited") == 1


async def test_a_request_beyond_the_limit_itself_and_one_beyond_the_day(
    limited: Callable[..., Bench],
) -> None:
    bench = limited(tokens_per_min=150, budget_per_day=300e-6)
    for tokens, code in ((200, "over_rate_limit"), (75, "insufficient_quota")):
        client = bench.client()
        client.send(chat_request(body(tokens), WHO))
        refused = client.answer()
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (429, code)
        assert refused.fields["x-should-retry"] == "false"
        assert "retry-after" not in refused.fields
    assert of(bench, quota.TOKENS) == 0


async def test_requests_at_a_time(limited: Callable[..., Bench]) -> None:
    bench = limited(max_concurrent=1)
    first, engine = await bench.begun(chat_request(body(), WHO))
    second = bench.client()
    second.send(chat_request(body(), WHO))
    assert second.answer().status == 429
    assert second.answer().fields["retry-after"] == "1"
    engine.send(answer(used(1, 1)))
    assert first.answer().status == 200
    second.send(chat_request(body(), WHO))
    (await bench.engine()).send(answer(used(1, 1)))
    assert [got.status for got in second.answers("POST", "POST")] == [429, 200]


async def test_what_nobody_computed_is_given_back(limited: Callable[..., Bench]) -> None:
    bench = limited(tokens_per_min=1000, requests_per_min=10)
    client, engine = await bench.begun(chat_request(body(), WHO))
    engine.send(answer(b'{"error":{"message":"no"}}', 400))
    assert client.answer().status == 400
    assert "x-ratelimit-limit-tokens" in client.answer().fields
    assert (of(bench, quota.TOKENS), of(bench, quota.REQUESTS)) == (0, 1)
    bench.upstreams.refusing.add("a")
    engine.transport.hang_up()
    client = bench.client()
    client.send(chat_request(body(), WHO))
    await bench.settle()
    assert client.answer().status == 502
    assert (of(bench, quota.TOKENS), of(bench, quota.REQUESTS)) == (0, 1)
    assert series(bench, "requests") == 1


@pytest.mark.parametrize("left", [True, False])
async def test_a_stream_without_usage_counts_its_events(
    limited: Callable[..., Bench], left: bool
) -> None:
    bench = limited(tokens_per_min=1000)
    client, engine = await bench.begun(chat_request(body(100, stream=True), WHO))
    prompt = of(bench, quota.TOKENS) - 100
    engine.send(STREAM_HEAD)
    for _ in range(7):
        engine.send(chunk(b'data: {"choices":[{"delta":{"content":"data: "}}]}\n\n'))
    if left:
        client.transport.hang_up()
    else:
        engine.transport.hang_up()  # the replica dies: the stream is cut
    await bench.settle()
    assert of(bench, quota.TOKENS) == prompt + 7
    assert of(bench, quota.CONCURRENT) == 0


async def test_a_client_that_leaves_before_a_replica_has_it(limited: Callable[..., Bench]) -> None:
    bench = limited(tokens_per_min=1000)
    bench.upstreams.gate = gate = asyncio.Event()
    client = bench.client()
    client.send(chat_request(body(), WHO))
    await bench.settle()
    assert of(bench, quota.CONCURRENT) == 1
    client.transport.hang_up()
    gate.set()
    await bench.settle()
    assert [of(bench, kind) for kind in (quota.TOKENS, quota.REQUESTS, quota.CONCURRENT)] == [0] * 3


async def test_an_answer_that_nothing_bounds_is_reckoned_as_the_mean(
    limited: Callable[..., Bench],
) -> None:
    bench = limited(tokens_per_min=100_000)
    for _ in range(200):
        _, engine = await bench.begun(chat_request(body(None), WHO))
        engine.send(answer(used(10, 40)))
    assert bench.plane.metering.mean_of("acme") == 40
    assert bench.plane.metering.mean_of("beta") == 256
    before = of(bench, quota.TOKENS)
    _, engine = await bench.begun(chat_request(body(None), WHO))
    assert of(bench, quota.TOKENS) == before + 10 + 40  # and its prompt as the last one had
    engine.send(answer(used(10, 40)))


async def test_who_has_no_limit_is_told_of_none_and_counted(limited: Callable[..., Bench]) -> None:
    bench = limited(tokens_per_min=1000)
    client, engine = await bench.begun(chat_request(body(), (bearer(OTHER),)))
    engine.send(answer(used(3, 4)))
    assert not [name for name in client.answer().fields if name.startswith("x-ratelimit")]
    assert of(bench, quota.TOKENS) == 0
    assert series(bench, "completion_tokens") == 4


async def test_a_change_of_limits_counts_at_once_and_mixes_nobody_up(
    limited: Callable[..., Bench],
) -> None:
    bench = limited(tokens_per_min=1000)
    client, engine = await bench.begun(chat_request(body(100), WHO))
    tenants = (TenantConfig(name="aaa", tokens_per_min=5), TenantConfig(name="acme"))
    config = bench.plane.config
    changed = type(config)(access=AccessConfig(tenants=tenants), access_log="off")
    bench.plane.reconfigure(changed, AccessLog("off"))
    engine.send(answer(used(10, 20)))
    assert client.answer().status == 200
    accounts = bench.plane.metering._accounts
    assert {row: account.sum(quota.TOKENS) for row, account in accounts.items()} == {0: 30, 1: 0}
    client, engine = await bench.begun(chat_request(body(100_000), WHO))
    engine.send(answer(used(10, 20)))
    assert client.answer().status == 200


async def test_a_line_of_usage_for_each_that_a_replica_had(
    limited: Callable[..., Bench], tmp_path: Path
) -> None:
    bench = limited(requests_per_min=2)
    path = tmp_path / "usage.jsonl"
    log = AccessLog(str(path))
    bench.plane.metering.change_log(log)
    for octets in (answer(used(12, 30, 4)), answer(b'{"ok":1}')):
        client, engine = await bench.begun(chat_request(body(), (*WHO, "x-request-id: mine")))
        engine.send(octets)
    client = bench.client()
    client.send(chat_request(body(), WHO))
    assert client.answer().status == 429
    log.close()
    first, second = (decode_usage(line) for line in path.read_bytes().splitlines())
    assert (first.request_id, first.tenant, first.key_id) == ("mine", "acme", "id-acme")
    assert (first.model, first.status, first.estimated) == ("m", 200, False)
    assert (first.prompt_tokens, first.cached_tokens, first.completion_tokens) == (12, 4, 30)
    assert first.cost == pytest.approx(129e-6)
    assert second.estimated
    assert (second.prompt_tokens, second.completion_tokens) == (12, 2)  # as the same one had before
    assert KEY.encode() not in path.read_bytes()


async def test_series_of_tenants_are_bounded(
    limited: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = limited()
    monkeypatch.setattr("proxy.core.claim_limits.TENANT_SERIES_MAX", 1)
    for key in (KEY, OTHER, OTHER):
        _, engine = await bench.begun(chat_request(body(), (bearer(key),)))
        engine.send(answer(used(1, 1)))
    tenants = {
        dict(sample.labels)["tenant"]: sample.value
        for sample in bench.plane.counters()
        if sample.name == "tenant_requests_total"
    }
    assert tenants == {"acme": 1, "other": 2}
