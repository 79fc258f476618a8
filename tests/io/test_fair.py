"""Tenants and deadlines at a worker: who makes room for whom, and who is told it is too late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from proxy.config_access import AccessConfig, ClassesConfig, TenantConfig
from proxy.core import claim_limits
from proxy.core.principal import Principal
from tests.fakes.plane import CHAT_BODY, Bench, Client, answer, chat_request, records

MakeBench = Callable[..., Bench]


def _full(make_bench: MakeBench, **config: Any) -> Bench:
    """Return a bench with one replica of one place."""
    bench = make_bench((), **config)
    bench.publish(*(msgspec.structs.replace(each, max_inputs=1) for each in records("a")))
    return bench


async def _ask(bench: Bench, tenant: str = "", *fields: str, body: bytes = CHAT_BODY) -> Client:
    bench.plane.admit = lambda *_: Principal(tenant, tenant)  # type: ignore[method-assign]
    client = bench.client()
    client.send(chat_request(body, fields))
    await bench.settle()
    bench.clock.advance(0.001)
    return client


async def _answered(bench: Bench) -> None:
    """The replica answers what it was sent last."""
    bench.upstreams.engines[-1].send(answer())
    await bench.settle()


def _deadlines(bench: Bench) -> dict[str, float]:
    return {
        sample.name: sample.value
        for sample in bench.plane.counters()
        if sample.name.startswith("deadline_") and dict(sample.labels)["class"] == "online"
    }


async def test_who_cannot_meet_his_deadline_any_more_is_told_so_at_once(
    make_bench: MakeBench,
) -> None:
    bench = _full(make_bench, access=AccessConfig(classes=ClassesConfig(late="shed")))
    await _ask(bench)
    late = await _ask(bench, "", "x-slo-ttft-ms: 200")
    patient = await _ask(bench)
    bench.sweep(0.1)
    await bench.settle()
    assert not late.received
    bench.sweep(0.2)
    await bench.settle()
    told = late.answer()
    assert (told.status, told.fields["x-should-retry"]) == (504, "false")
    assert b"deadline_exceeded" in told.body
    assert not patient.received
    await _answered(bench)
    await _answered(bench)
    assert patient.answer().status == 200
    counts = {"deadline_met_total": 0, "deadline_missed_total": 0, "deadline_shed_total": 1}
    assert _deadlines(bench) == counts


async def test_who_is_late_is_served_after_those_who_are_not(make_bench: MakeBench) -> None:
    bench = _full(make_bench)
    first = await _ask(bench, "", "x-slo-ttft-ms: 1000")
    late = await _ask(bench, "", "x-slo-ttft-ms: 200")
    bench.sweep(0.3)
    await bench.settle()
    fresh = await _ask(bench, "", "x-slo-ttft-ms: 900")
    await _answered(bench)
    assert first.answer().status == 200
    await _answered(bench)
    assert (fresh.answer().status, late.received) == (200, b"")
    await _answered(bench)
    assert late.answer().status == 200
    counts = {"deadline_met_total": 2, "deadline_missed_total": 1, "deadline_shed_total": 0}
    assert _deadlines(bench) == counts


async def test_nobody_waits_for_a_client_that_has_given_up_by_its_own_clock(
    make_bench: MakeBench,
) -> None:
    bench = _full(make_bench)
    await _ask(bench)
    gone = await _ask(bench, "", "x-stainless-timeout: 5", "x-slo-ttft-ms: 100")
    bench.sweep(4.0)
    await bench.settle()
    assert not gone.received
    bench.sweep(1.1)
    await bench.settle()
    assert gone.answer().status == 504
    await _answered(bench)


async def test_a_tenant_that_fills_the_room_makes_room_for_another(make_bench: MakeBench) -> None:
    tenants = (TenantConfig(name="flood"), TenantConfig(name="guest"))
    bench = _full(make_bench, queue_size=4, access=AccessConfig(tenants=tenants))
    long = CHAT_BODY.replace(b"hello", b"hello " * 5_000)  # more than a quantum
    flood = [await _ask(bench, "flood", body=long)]
    flood += [await _ask(bench, "flood") for _ in range(5)]
    assert [client.answer().status for client in flood if client.received] == [429]
    guest = await _ask(bench, "guest")
    assert not guest.received
    sent_away = flood[4].answer()
    assert (sent_away.status, "retry-after" in sent_away.fields) == (429, True)
    await _answered(bench)
    await _answered(bench)
    assert guest.answer().status == 200  # before those of the flood that came before it
    for _ in range(3):
        await _answered(bench)
    assert [client.answer().status for client in flood] == [200, 200, 200, 200, 429, 429]


async def test_no_tenant_has_all_places_of_a_proxy(make_bench: MakeBench) -> None:
    tenants = (TenantConfig(name="flood"), TenantConfig(name="guest"))
    bench = make_bench(max_concurrent_requests=34, access=AccessConfig(tenants=tenants))
    flood = [await _ask(bench, "flood") for _ in range(34)]
    refused = [client.answer().status for client in flood if client.received]
    assert refused == [429, 429]
    guest = await _ask(bench, "guest")
    assert not guest.received
    for client in (*flood, guest):
        client.transport.hang_up()
    await bench.settle()


async def test_shares_are_put_right_by_what_the_engine_counted(make_bench: MakeBench) -> None:
    tenants = (TenantConfig(name="acme", weight=2.0),)
    bench = _full(make_bench, access=AccessConfig(tenants=tenants))
    bench.plane.admit = lambda *_: _weighing("acme", 2.0)  # type: ignore[method-assign]
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    (account,) = bench.plane.waiting.shares.accounts
    assert account.counter > claim_limits.OUTPUT_TOKENS_DEFAULT / 2.0
    bench.upstreams.engines[-1].send(
        answer(b'{"usage":{"prompt_tokens":30,"completion_tokens":10,"total_tokens":40}}')
    )
    await bench.settle()
    assert client.answer().status == 200
    assert 10 / 2.0 <= account.counter <= 40 / 2.0


def _weighing(tenant: str, weight: float) -> Principal:
    principal = Principal(tenant, tenant)
    principal.weight = weight
    return principal
