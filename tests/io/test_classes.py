"""What a client is told of its wait and its class, and what is counted of each class."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from proxy.config_access import AccessConfig, ClassesConfig, TenantConfig
from proxy.contract import PoolRecord, ReplicaRecord
from proxy.core.principal import Principal
from tests.fakes.plane import (
    CHAT_BODY,
    Bench,
    Client,
    Engine,
    RealPlane,
    answer,
    chat_request,
    records,
)
from tests.fakes.simulator import simulator

MakeBench = Callable[..., Bench]
_PRIORITIES = ("x-vllm-priority: 0", "x-vllm-priority: 1000", "x-vllm-priority: 1000000")


def _full(bench: Bench) -> None:
    bench.publish(*(msgspec.structs.replace(each, max_inputs=1) for each in records("a")))


async def _ask(bench: Bench, tier: str | None = None, *fields: str) -> Client:
    said = "" if tier is None else f',"service_tier":"{tier}"'
    client = bench.client()
    client.send(chat_request(CHAT_BODY[:-1] + f"{said}}}".encode(), fields))
    await bench.settle()
    return client


async def _answered(bench: Bench, number: int) -> None:
    bench.upstreams.engines[number].send(answer())
    await bench.settle()


def _counts(bench: Bench, name: str) -> dict[tuple[str, ...], float]:
    samples = [sample for sample in bench.plane.counters() if sample.name == name]
    return {
        tuple(value for _, value in sample.labels): sum(sample.buckets) or sample.value
        for sample in samples
        if sum(sample.buckets) or sample.value
    }


async def test_an_answer_that_waited_says_how_long_and_what_for(bench: Bench) -> None:
    _full(bench)
    first, second = await _ask(bench), await _ask(bench, "priority")
    bench.clock.advance(0.25)
    await _answered(bench, 0)
    assert "x-doherty-queue-ms" not in first.answer().fields
    await _answered(bench, 0)
    fields = second.answer().fields
    assert (fields["x-doherty-queue-ms"], fields["x-doherty-queue-reason"]) == (
        "250",
        "replicas-busy",
    )
    assert "x-doherty-class" not in fields  # nobody asked
    assert _counts(bench, "queue_waits_total") == {("online", "replicas-busy"): 1}
    assert _counts(bench, "queue_wait_seconds") == {("online",): 1}
    assert _counts(bench, "class_requests_total") == {("online", "ok"): 2}


async def test_one_that_waited_in_vain_is_told_so_too(make_bench: MakeBench) -> None:
    bench = make_bench((), queue_timeout_secs=5.0)
    _full(bench)
    await _ask(bench)
    second = await _ask(bench)
    bench.sweep(6.0)
    got = second.answer()
    assert got.status == 408
    assert got.fields["x-doherty-queue-ms"] == "6000"
    assert _counts(bench, "class_requests_total") == {("online", "queue_timeout"): 1}


async def test_who_waits_for_a_start_is_told_that(make_bench: MakeBench) -> None:
    bench = make_bench(())
    zero = PoolRecord(model="m", pool="m", wakes=True, start_s=7.0, work_class="semi-online")
    bench.publish(pools=(zero,))
    client = await _ask(bench, None, "x-doherty-explain: 1")
    bench.clock.advance(2.0)
    up = msgspec.structs.replace(zero, awake=1)
    bench.publish(*(msgspec.structs.replace(r, pool="m") for r in records("a")), pools=(up,))
    await bench.settle()
    await _answered(bench, 0)
    fields = client.answer().fields
    assert (fields["x-doherty-queue-reason"], fields["x-doherty-queue-ms"]) == ("starting", "2000")
    assert fields["x-doherty-class"] == "semi-online"


async def test_who_waits_though_only_online_work_may_come_is_told_that(
    make_bench: MakeBench,
) -> None:
    access = AccessConfig(classes=ClassesConfig(online_reserve=0.5))
    bench = make_bench((), access=access)
    bench.publish(*(msgspec.structs.replace(each, max_inputs=2) for each in records("a")))
    await _ask(bench, None, "x-doherty-class: semi-online")
    second = await _ask(bench, None, "x-doherty-class: semi-online")
    await _answered(bench, 0)
    await _answered(bench, 0)
    assert second.answer().fields["x-doherty-queue-reason"] == "reserve"


async def test_what_gave_its_place_away_is_told_that(bench: Bench) -> None:
    _full(bench)
    line, person = await _ask(bench, "flex"), await _ask(bench, "priority")
    bench.clock.advance(1.0)
    await _answered(bench, 1)
    assert person.answer().status == 200
    await _answered(bench, 1)
    assert line.answer().fields["x-doherty-queue-reason"] == "preempted"
    due = {("offline", "preempted"): 1, ("online", "replicas-busy"): 1}
    assert _counts(bench, "queue_waits_total") == due


async def test_who_is_over_his_share_is_told_that(make_bench: MakeBench) -> None:
    tenants = (TenantConfig(name="greedy"), TenantConfig(name="modest"))
    bench = make_bench((), access=AccessConfig(tenants=tenants))
    _full(bench)
    long = CHAT_BODY.replace(b"hello", b"hello " * 40_000)
    for tenant, body in (("modest", CHAT_BODY), ("greedy", long), ("modest", CHAT_BODY)):
        await _sent_by(bench, Principal(tenant, "k"), body)
        await _answered(bench, 0)
    await _sent_by(bench, Principal("modest", "k"), CHAT_BODY)
    bench.plane.admit = lambda *_: Principal("greedy", "k")  # type: ignore[method-assign]
    client = await _ask(bench)
    bench.clock.advance(0.5)
    await _answered(bench, 0)
    await _answered(bench, 0)
    assert client.answer().fields["x-doherty-queue-reason"] == "share"


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        (("x-slo-ttft-ms: 500",), {("online", "ttft"): 1}),
        (("x-slo-tpot-ms: 20", "x-priority: bulk"), {("offline", "tpot"): 1}),
        (("x-stainless-read-timeout: 5",), {("online", "patience"): 1}),
        (("x-stainless-read-timeout: 600",), {}),
    ],
)
async def test_what_was_wanted_is_counted_by_class(
    bench: Bench, fields: tuple[str, ...], due: dict[tuple[str, str], int]
) -> None:
    await _ask(bench, None, *fields)
    await _answered(bench, 0)
    assert _counts(bench, "slo_requests_total") == due


async def test_a_first_token_is_measured_by_class(bench: Bench) -> None:
    await _ask(bench, None, "x-doherty-class: semi-online")
    bench.clock.advance(0.1)
    await _answered(bench, 0)
    assert _counts(bench, "class_time_to_first_token_seconds") == {("semi-online",): 1}


async def test_a_wanted_time_that_is_none_is_400_and_the_connection_goes_on(bench: Bench) -> None:
    client = await _ask(bench, None, "x-slo-ttft-ms: soon")
    error = json.loads(client.answer().body)["error"]
    assert (error["param"], error["code"]) == ("x-slo-ttft-ms", "invalid_request")
    assert not client.transport.is_closing()
    assert not bench.upstreams.engines


# --- in the engine's own queue ----------------------------------------------------------------


async def _sent_by(bench: Bench, principal: Principal, body: bytes, *fields: str) -> Engine:
    bench.plane.admit = lambda *_: principal  # type: ignore[method-assign]
    client = bench.client()
    client.send(chat_request(body, fields))
    return await bench.engine()


@pytest.mark.parametrize(
    ("tenant", "work_class", "due"),
    [
        ("", "online", None),
        ("acme", "online", b"0"),
        ("", "semi-online", b"1000"),
        ("acme", "offline", b"1000000"),
    ],
)
async def test_a_class_has_its_place_in_an_engine_and_a_tenant_no_other(
    make_bench: MakeBench, tenant: str, work_class: str, due: bytes | None
) -> None:
    (record,) = records("a")
    bench = make_bench((msgspec.structs.replace(record, priority_fields=_PRIORITIES),))
    fields = (f"x-doherty-class: {work_class}", "x-vllm-priority: -7")
    engine = await _sent_by(bench, Principal(tenant, "k"), CHAT_BODY, *fields)
    lines = engine.received.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert [line for line in lines if b"priority" in line] == (
        [] if due is None else [b"x-vllm-priority: " + due]
    )


@pytest.mark.parametrize(
    ("tenant", "member", "due"),
    [
        ("acme", '"priority":-9', 0),
        ("acme", '"pri\\u006frity":-9', 0),
        ("", '"priority":-9', -9),
        ("acme", '"n":1', None),
    ],
)
async def test_a_body_of_a_tenant_names_no_priority_of_its_own(
    bench: Bench, tenant: str, member: str, due: Any
) -> None:
    body = CHAT_BODY[:-1] + f",{member}}}".encode()
    engine = await _sent_by(bench, Principal(tenant, "k"), body)
    sent = json.loads(engine.received.partition(b"\r\n\r\n")[2])
    assert sent.get("priority") == due


# --- from official clients --------------------------------------------------------------------


async def test_official_clients_tell_their_patience_and_their_own_default_is_none() -> None:
    async with simulator() as engine:
        record = ReplicaRecord(replica_id="a", url=engine.url, models=("demo",))
        async with RealPlane([record]) as proxy:
            url = f"http://127.0.0.1:{proxy.port}"
            for timeout in (7.5, 600.0):
                ask: dict[str, Any] = {
                    "model": "demo",
                    "messages": [{"role": "user", "content": "hello"}],
                    "max_tokens": 2,
                    "timeout": timeout,
                }
                async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as one:
                    await one.chat.completions.create(**ask)
                async with anthropic.AsyncAnthropic(base_url=url, api_key="k") as other:
                    await other.messages.create(**ask)
            found = [s for s in proxy.plane.counters() if s.name == "slo_requests_total"]
    assert [(s.labels, s.value) for s in found] == [
        ((("class", "online"), ("wish", "patience")), 2)
    ]
