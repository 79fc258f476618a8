"""A trace goes through: the client's span, ours, the replica's; and it costs nobody his answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
import pytest

from proxy.config import ConfigError, ProxyConfig
from proxy.contract import PoolRecord, ReplicaRecord, span_export
from proxy.contract.span_export import SpanCounts, SpanExport
from proxy.contract.spans import CLIENT, INTERNAL, SERVER, SpanRecord, endpoint_url
from proxy.core import claim_limits, limits
from proxy.core.request_spans import NEWEST, RequestFacts
from proxy.core.trace_context import SAMPLED, read_origin
from proxy.io import regions as regions_module
from proxy.io import tracing
from proxy.io.tracing import Tracer, check_tracing, close_tracer, span_samples, tracer_of
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json, streaming
from tests.fakes.otlp_sink import OtlpSink, Told
from tests.fakes.plane import (
    CHAT_BODY,
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    RealPlane,
    answer,
    chat_request,
    chunk,
    records,
    until,
)
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.regions import InRegion, joined
from tests.fakes.simulator import FAST, simulator
from tests.fakes.talk import Talk, ask
from tests.fakes.traces import PARENT, SPAN, TRACE, traced

MakeBench = Callable[..., Bench]
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "20"}
USAGE = b'{"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'


@contextmanager
def tracing_to(proxy: RealPlane, sink: OtlpSink, **config: object) -> Iterator[None]:
    """Have a plane on real sockets send its traces there."""
    told = msgspec.structs.replace(
        proxy.plane.config, otlp_traces_endpoint=sink.url, region=proxy.plane.region, **config
    )
    proxy.plane.tracer = tracer_of(told, SOON, proxy.plane.span_counts)
    yield
    close_tracer(proxy.plane.tracer)


def parent_of(request: Received) -> tuple[str, str, int]:
    """Return what a replica was told: trace, parent, flags."""
    origin = read_origin([(b"traceparent", request.fields["traceparent"].encode())])
    assert origin is not None
    return origin.trace_id.decode(), origin.parent_id.decode(), origin.flags


# --- with tracing off -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [PARENT, "traceparent: not one", "traceparent: a, b"])
async def test_with_tracing_off_the_fields_pass_as_they_came(bench: Bench, value: str) -> None:
    fields = [value, "tracestate: A=b,,c", "baggage: user=1"]
    client, engine = await bench.begun(chat_request(fields=fields))
    for field in fields:
        assert field.encode() + b"\r\n" in engine.received
    assert engine.received.count(b"traceparent") == 1
    engine.send(answer())
    assert client.answer().status == 200


# --- whose trace it is ----------------------------------------------------------------------


async def test_the_replica_s_parent_is_our_span_and_ours_is_the_client_s() -> None:
    async def reply(connection: Connection, _: Received) -> None:
        await answer_json(connection, USAGE)

    async with ScriptedEngine(reply) as engine, OtlpSink() as sink:
        proxy = RealPlane([engine.record("a")])
        async with proxy:
            with tracing_to(proxy, sink):
                fields = [PARENT, "tracestate: v=1, w=2", "baggage: k=v"]
                answered = await ask(proxy.port, chat_request(fields=fields))
                assert answered.status == 200
                server, client = await sink.until(2)
    (request,) = engine.requests
    assert (server.name, server.kind) == ("chat m", SERVER + 1)  # OTLP counts from 1
    assert (server.trace_id, server.parent_id, server.state) == (TRACE, SPAN, "v=1,w=2")
    assert (client.name, client.kind, client.parent_id) == ("POST", CLIENT + 1, server.span_id)
    assert parent_of(request) == (TRACE, client.span_id, SAMPLED)
    assert (request.fields["tracestate"], request.fields["baggage"]) == ("v=1,w=2", "k=v")
    assert server.start_ns <= client.start_ns < client.end_ns <= server.end_ns
    assert [name for name, _ in server.events] == ["request.read", "first_token"]
    assert [name for name, _ in client.events] == ["sent", "first_token"]
    assert all(server.start_ns <= at_ns <= server.end_ns for _, at_ns in server.events)
    told = server.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.system"] == "doherty"  # whose engine it is, nobody has said
    assert told["gen_ai.request.model"] == "m"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (7, 3)
    assert (
        told["http.response.status_code"] == client.attributes["http.response.status_code"] == 200
    )
    assert (client.attributes["server.address"], client.attributes["server.port"]) == (
        "127.0.0.1",
        engine.port,
    )
    assert client.attributes["doherty.decision"] == "new"
    assert client.attributes["doherty.price_s"] > 0
    assert server.resource["service.name"] == "doherty"
    assert not server.failed
    assert not client.failed


async def test_the_simulator_tells_whose_trace_it_was_told() -> None:
    async with simulator() as engine, OtlpSink() as sink:
        record = ReplicaRecord(replica_id="a", url=engine.url, engine="vllm")
        async with RealPlane([record]) as proxy:
            with tracing_to(proxy, sink):
                body = b'{"model":"%b","prompt":"p","max_tokens":2}' % FAST.models[0].encode()
                head = b"POST /v1/completions HTTP/1.1\r\nhost: p\r\n" + PARENT.encode()
                request = b"%b\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body)
                assert (await ask(proxy.port, request)).status == 200
                _, client = await sink.until(2)
        told = (await engine.state())["traceparents"]
    assert told == [f"00-{TRACE}-{client.span_id}-01"]
    assert client.attributes["doherty.engine"] == "vllm"


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["traceparent: 00-" + "0" * 32 + f"-{SPAN}-01"],
        [f"traceparent: 00-{TRACE.upper()}-{SPAN}-01"],
        [f"traceparent: ff-{TRACE}-{SPAN}-01"],
        [PARENT, PARENT],
        [PARENT + "-more"],
        ["traceparent: " + "\xff" * 8],
    ],
)
async def test_what_cannot_be_believed_begins_a_trace(bench: Bench, fields: list[str]) -> None:
    kept = traced(bench)
    lines = [*fields, "tracestate: v=1"]
    request = chat_request(fields=lines).decode().encode("latin-1")
    client, engine = await bench.begun(request)
    engine.send(answer())
    assert client.answer().status == 200
    assert engine.received.count(b"traceparent: 00-") == 1
    assert b"tracestate" not in engine.received
    assert kept[0].parent_id == 0
    assert kept[0].trace_id not in (0, int(TRACE, 16))
    assert b"00-%032x-%016x-03" % (kept[0].trace_id, kept[1].span_id) in engine.received


@pytest.mark.parametrize(
    ("config", "field", "recorded"),
    [
        ({}, "", True),
        ({}, f"traceparent: 00-{TRACE}-{SPAN}-00", False),
        ({"trace_sample_ratio": 0.0}, "", False),
        ({"trace_sample_ratio": 0.0}, PARENT, True),
        ({"trace_sample_ratio": 0.0, "trace_context": "restart"}, PARENT, False),
        ({"trace_context": "restart"}, f"traceparent: 00-{TRACE}-{SPAN}-00", True),
    ],
)
async def test_a_client_is_followed_and_else_the_share_counts(
    make_bench: MakeBench, config: dict[str, object], field: str, recorded: bool
) -> None:
    bench = make_bench(**config)
    kept = traced(bench)
    client, engine = await bench.begun(chat_request(fields=[field] if field else []))
    engine.send(answer())
    assert client.answer().status == 200
    assert len(kept.spans) == (2 if recorded else 0)
    flags = engine.received.partition(b"traceparent: ")[2][:55].rpartition(b"-")[2]
    assert (int(flags, 16) & SAMPLED == SAMPLED) is recorded  # the replica begins none of its own


async def test_a_trace_that_is_restarted_is_linked_to_the_client_s(make_bench: MakeBench) -> None:
    bench = make_bench(trace_context="restart")
    kept = traced(bench)
    client, engine = await bench.begun(chat_request(fields=[PARENT, "tracestate: v=1"]))
    engine.send(answer())
    assert client.answer().status == 200
    assert kept[0].parent_id == 0
    assert kept[0].trace_id != int(TRACE, 16)
    assert kept[0].linked == (int(TRACE, 16), int(SPAN, 16))
    assert TRACE.encode() not in engine.received
    assert b"tracestate" not in engine.received


async def test_a_client_that_claims_to_be_a_region_is_not_followed(make_bench: MakeBench) -> None:
    """With no other region configured there is none whose word it could be."""
    bench = make_bench(trace_context="restart")
    kept = traced(bench)
    client = bench.client()
    client.send(chat_request(fields=[PARENT, "x-doherty-hop: made up"]))
    assert client.answer().status == 403
    assert kept[0].trace_id != int(TRACE, 16)


async def test_a_hop_goes_on_in_the_other_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_PAUSE_FIRST_S", 0.005)
    monkeypatch.setattr(claim_limits, "REGION_PAUSE_MAX_S", 0.02)
    monkeypatch.setattr(regions_module, "SUMMARY_INTERVAL_S", 0.02)
    key = "the key of all regions"
    async with ScriptedEngine() as engine, OtlpSink() as sink:
        us = InRegion("us", [engine.record("a")], peer_key=key)
        eu = InRegion("eu", [], peer_key=key)
        # There, too, clients are not believed; another region is.
        async with joined(eu, us):
            with tracing_to(eu, sink), tracing_to(us, sink, trace_context="restart"):
                answered = await ask(eu.port, chat_request(fields=[PARENT]))
                assert answered.status == 200, answered.body
                await sink.until(4)
    (request,) = engine.requests
    by_region = {(span.resource["doherty.region"], span.kind): span for span in sink.spans}
    there, across = by_region["eu", SERVER + 1], by_region["eu", CLIENT + 1]
    here, computed = by_region["us", SERVER + 1], by_region["us", CLIENT + 1]
    assert [s.trace_id for s in (there, across, here, computed)] == [TRACE] * 4
    assert [there.parent_id, across.parent_id, here.parent_id, computed.parent_id] == [
        SPAN, there.span_id, across.span_id, here.span_id,
    ]  # fmt: skip
    assert parent_of(request)[:2] == (TRACE, computed.span_id)
    assert across.attributes["doherty.decision"] == "region"
    assert across.attributes["doherty.region"] == "us"
    assert across.attributes["doherty.price.round_trip_s"] > 0


# --- what is told of a request --------------------------------------------------------------


async def test_each_replica_that_was_tried_is_a_span_of_its_own(make_bench: MakeBench) -> None:
    bench = make_bench(records(["a", "b"]))
    kept = traced(bench)
    client = bench.client()
    bench.upstreams.refusing = {"a", "b"}
    client.send(chat_request())
    await bench.settle()
    bench.upstreams.refusing = set()
    assert client.answer().status == 502
    server, *tried = kept.spans
    assert [span.kind for span in kept.spans] == [SERVER, CLIENT, CLIENT]
    assert {span.attributes["doherty.replica"] for span in tried} == {"a", "b"}
    assert [span.error for span in tried] == ["connect_failed", "replica_unreachable"]
    assert [span.attributes.get("http.request.resend_count") for span in tried] == [None, 1]
    assert len({span.span_id for span in kept.spans}) == 3
    assert server.error == server.attributes["error.type"] == "replica_unreachable"
    assert server.attributes["doherty.attempts"] == 2
    assert not any(span.events for span in tried)


async def test_a_retry_that_goes_well_is_told_to_the_second_replica(make_bench: MakeBench) -> None:
    bench = make_bench(records(["a", "b"]))
    kept = traced(bench)
    bench.upstreams.refusing = {"a"}
    for _ in range(2):  # one of both comes to a first
        client, engine = await bench.begun(chat_request(fields=[PARENT]))
        engine.send(answer(USAGE))
        assert client.answer().status == 200
        if len(kept.spans) == 3:
            break
        kept.spans.clear()
        bench.plane.clear("a")
    server, first, second = kept.spans
    assert (first.error, second.error, server.error) == ("connect_failed", None, None)
    assert b"00-%b-%016x-01" % (TRACE.encode(), second.span_id) in engine.received
    assert first.end_ns <= second.start_ns
    assert second.attributes["http.response.status_code"] == 200


async def test_a_wait_is_a_span_with_its_reason(make_bench: MakeBench) -> None:
    record = records(["a"])
    bench = make_bench([])
    kept = traced(bench)
    pool = PoolRecord(model="m", pool="p", wakes=True)
    bench.publish(pools=(pool,))
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    bench.clock.advance(2.0)
    bench.publish(*record, pools=(pool,))
    engine = await bench.engine()
    bench.clock.advance(0.5)
    engine.send(answer(USAGE))
    assert client.answer().status == 200
    server, waited, sent = kept.spans
    assert (waited.name, waited.kind, waited.parent_id) == ("queue", INTERNAL, server.span_id)
    assert waited.end_ns - waited.start_ns == pytest.approx(2e9, rel=1e-6)
    assert waited.attributes["doherty.held_for"]
    assert sent.start_ns >= waited.end_ns
    assert server.attributes["doherty.queue_s"] == pytest.approx(2.0)
    assert server.end_ns - server.start_ns == pytest.approx(2.5e9, rel=1e-6)


async def test_a_client_that_goes_and_a_stream_that_is_cut(bench: Bench) -> None:
    kept = traced(bench)
    body = CHAT_BODY[:-1] + b',"stream":true}'
    client, engine = await bench.begun(chat_request(body))
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    client.transport.hang_up()
    await bench.settle()
    server, sent = kept.spans
    assert server.attributes["error.type"] == sent.error == "client_gone"
    assert server.error is None  # 499: the server has not failed
    assert server.attributes["http.response.status_code"] == 499
    kept.spans.clear()
    client, engine = await bench.begun(chat_request(body))
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    engine.transport.hang_up()
    await bench.settle()
    server, sent = kept.spans
    assert server.error == sent.error == "stream_cut"
    assert sent.attributes["http.response.status_code"] == 200


async def test_an_engine_s_error_and_a_refusal_of_ours(make_bench: MakeBench) -> None:
    bench = make_bench(api_key="sesame")
    kept = traced(bench)
    client, engine = await bench.begun(chat_request(fields=["authorization: Bearer sesame"]))
    engine.send(answer(b'{"error":{"message":"no"}}', status=500))
    assert client.answer().status == 500
    assert (kept[0].error, kept[1].error) == ("500", "500")
    kept.spans.clear()
    client = bench.client()
    client.send(chat_request())
    assert client.answer().status == 401
    (refused,) = kept.spans
    assert refused.name == "chat"  # a model that nobody serves names no span
    assert refused.attributes["error.type"] == "invalid_api_key"
    assert refused.error is None
    assert "gen_ai.request.model" not in refused.attributes


async def test_a_stream_tells_its_pace_and_its_cache(bench: Bench) -> None:
    kept = traced(bench, {"OTEL_SEMCONV_STABILITY_OPT_IN": f"http, {NEWEST}"})
    body = CHAT_BODY[:-1] + b',"stream":true}'
    client, engine = await bench.begun(chat_request(body))
    bench.clock.advance(0.25)
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    bench.clock.advance(0.5)
    usage = (
        b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":6,'
        b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    )
    engine.send(chunk(usage) + chunk(EVENTS[-1]) + LAST_CHUNK)
    assert client.answer().status == 200
    told = kept[0].attributes
    assert told["doherty.time_to_first_token_s"] == pytest.approx(0.25)
    assert told["doherty.time_per_output_token_s"] == pytest.approx(0.1)
    assert told["gen_ai.usage.cache_read.input_tokens"] == 4
    assert told["gen_ai.provider.name"] == "doherty"
    assert "gen_ai.system" not in told


async def test_what_the_proxy_answers_itself_is_in_no_trace(bench: Bench) -> None:
    kept = traced(bench)
    client = bench.client()
    client.send(b"GET /livez HTTP/1.1\r\nhost: p\r\n\r\n")
    assert client.answer("GET").status == 200
    assert kept.spans == []


async def test_a_request_for_jobs_passes_its_trace_on(make_bench: MakeBench) -> None:
    bench = make_bench(offline_url="http://127.0.0.1:8003")
    kept = traced(bench)
    client = bench.client()
    client.send(f"GET /v1/batches HTTP/1.1\r\nhost: p\r\n{PARENT}\r\n\r\n".encode())
    await bench.settle()
    (engine,) = bench.service.engines
    engine.send(answer())
    await bench.settle()
    assert client.answer("GET").status == 200
    (span,) = kept.spans
    assert span.name == "GET batches"
    assert b"00-%b-%016x-01" % (TRACE.encode(), span.span_id) in engine.received


# --- nothing that is nobody's business -------------------------------------------------------


async def test_no_prompt_key_or_session_is_in_what_is_exported() -> None:
    canaries = ("canary-prompt", "canary-key", "canary-answer", "canary-session", "canary-user")
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": canaries[0]}],
        "prompt_cache_key": canaries[3],
        "user": canaries[4],
    }
    streamed = json.dumps({**body, "stream": True}).encode()
    fields = [f"authorization: Bearer {canaries[1]}", f"x-session-id: {canaries[3]}", PARENT]
    script = streaming(b'data: {"x":"canary-answer"}\n\n', b"data: [DONE]\n\n")
    async with ScriptedEngine(script) as engine, OtlpSink() as sink:
        proxy = RealPlane([engine.record("a")], api_key=canaries[1])
        async with proxy:
            with tracing_to(proxy, sink):
                assert (await ask(proxy.port, chat_request(streamed, fields))).status == 200
                broken = chat_request(streamed[:-1], fields)
                assert (await ask(proxy.port, broken)).status == 400
                wrong = [f"authorization: Bearer {canaries[1]}-not"]
                assert (await ask(proxy.port, chat_request(streamed, wrong))).status == 401
                await sink.until(4)
    assert b"chat m" in sink.octets
    for canary in canaries:
        assert canary.encode() not in sink.octets


# --- the collector ---------------------------------------------------------------------------


def exporting(sink_url: str, **environment: str) -> SpanExport:
    config = ProxyConfig(otlp_traces_endpoint=sink_url)
    tracer = Tracer(config, {**SOON, **environment})
    tracer.export.close()
    return SpanExport(tracer.export.settings, lambda number: [a_span(number)])


def a_span(number: int) -> SpanRecord:
    return SpanRecord(
        f"s{number}", INTERNAL, trace_id=1, span_id=number, start_ns=1, end_ns=2, attributes={}
    )


@asynccontextmanager
async def closing(export: SpanExport) -> AsyncIterator[SpanExport]:
    yield export
    await asyncio.to_thread(export.close)


async def test_what_waits_at_the_end_is_sent() -> None:
    async with OtlpSink() as sink:
        async with closing(exporting(sink.url, OTEL_BSP_SCHEDULE_DELAY="60000")) as export:
            for number in range(1, 6):
                export.put(number)
        assert [span.name for span in sink.spans] == ["s1", "s2", "s3", "s4", "s5"]
        assert export.counts.exported_total == 5


async def test_a_full_batch_is_not_waited_for_and_batches_are_bounded() -> None:
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "3"}
    async with OtlpSink() as sink:
        async with closing(exporting(sink.url, **environment)) as export:
            for number in range(1, 4):
                export.put(number)
            await sink.until(3)
            for number in range(4, 8):
                export.put(number)
        assert len(sink.spans) == 7
        assert sink.posts >= 3


async def test_a_collector_that_refuses_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "doherty.traces")
    async with OtlpSink(status=400) as sink, closing(exporting(sink.url)) as export:
        for number in range(1, 4):
            export.put(number)
            await until(lambda number=number: export.counts.refused_total == number)  # type: ignore[misc]
        sink.status = 200
        export.put(4)
        await sink.until(1)
        await until(lambda: export.counts.exported_total == 1)
    said = [r.getMessage() for r in caplog.records if r.name == "doherty.traces"]
    assert len(said) == 2, said
    assert "traces are not taken" in said[0]
    assert "400" in said[0]
    assert said[1] == "traces are taken again"
    assert not logging.getLogger("opentelemetry").propagate  # what it says comes by us, once


async def test_a_collector_that_is_slow_or_gone_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(span_export, "FLUSH_S", 0.05)
    async with ScriptedEngine() as engine, OtlpSink(pause_s=30.0) as sink:
        proxy = RealPlane([engine.record("a")])
        async with proxy:
            tracer = proxy.plane.tracer = Tracer(
                ProxyConfig(otlp_traces_endpoint=sink.url),
                {**SOON, "OTEL_BSP_MAX_QUEUE_SIZE": "4", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "2"},
            )
            assert (await ask(proxy.port, chat_request())).status == 200
            await until(lambda: sink.posts == 1)  # it has the first, and says nothing
            for _ in range(8):
                assert (await ask(proxy.port, chat_request())).status == 200
            counted = {
                dict(sample.labels).get("reason", ""): sample.value
                for sample in span_samples(tracer.export.counts)
            }
            assert counted == {"": 0, "queue_full": 8, "export_failed": 0}  # of two spans each
            await asyncio.to_thread(close_tracer, tracer)  # it does not wait for the collector


async def test_what_is_counted_outlives_a_reload() -> None:
    """And the last that one sends as it is closed counts, too, if nothing comes after it."""
    counts = SpanCounts()
    async with OtlpSink() as sink:
        config = ProxyConfig(otlp_traces_endpoint=sink.url)
        first = tracer_of(config, {"OTEL_BSP_SCHEDULE_DELAY": "60000"}, counts)
        assert first is not None
        first.over(RequestFacts(b"1" * 32, b"1" * 16, 0.0))
        second = tracer_of(config, {"OTEL_BSP_SCHEDULE_DELAY": "60000"}, counts)
        assert second is not None
        second.over(RequestFacts(b"2" * 32, b"2" * 16, 0.0))
        assert tracer_of(ProxyConfig(), SOON, counts) is None  # off
        for each in (first, second):
            await asyncio.to_thread(close_tracer, each)
    assert [sample.value for sample in span_samples(counts)] == [2, 0, 0]


async def test_a_span_that_cannot_be_made_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def make(number: int) -> list[SpanRecord]:
        return [a_span(12 // number)]

    async with OtlpSink() as sink:
        settings = exporting(sink.url).settings
        async with closing(SpanExport(settings, make)) as export:
            for number in (4, 0, 0, 2):
                export.put(number)
        assert [span.name for span in sink.spans] == ["s3", "s6"]
    assert (export.counts.exported_total, export.counts.refused_total) == (2, 2)
    assert len([r for r in caplog.records if r.name == "doherty.traces"]) == 1


# --- what is wrong is told at the start -------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("c:4318", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_an_endpoint_is_a_collector_or_a_path_of_it(given: str, url: str) -> None:
    assert endpoint_url(given) == url


@pytest.mark.parametrize(
    ("given", "words"), [("grpc://c", "no URL"), ("c:4317", "gRPC"), ("http://", "no URL")]
)
def test_an_endpoint_that_cannot_be_is_refused(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_tracing(ProxyConfig(otlp_traces_endpoint=given), {})


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "missing_library", lambda: "pip install 'doherty[otel]'")
    with pytest.raises(ConfigError, match=r"doherty\[otel\]"):
        check_tracing(ProxyConfig(enable_trace=True), {})
    assert check_tracing(ProxyConfig(), {}) == []


def test_the_environment_may_forbid_traces() -> None:
    config = ProxyConfig(enable_trace=True)
    for environment in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert tracer_of(config, environment, SpanCounts()) is None
        assert "off" in check_tracing(config, environment)[0]
    assert check_tracing(config, {"OTEL_TRACES_SAMPLER": "jaeger_remote"})


async def test_a_proxy_s_workers_trace_and_send_what_they_have_before_they_end() -> None:
    environment = {"OTEL_SERVICE_NAME": "edge", "OTEL_RESOURCE_ATTRIBUTES": "team=serving"}
    async with ScriptedEngine() as engine, OtlpSink() as sink:
        flags = ("--worker-urls", engine.url, "--otlp-traces-endpoint", sink.url, "--log-json")
        async with ProxyProcess(*flags, environment=environment) as proxy:
            async with Talk(proxy.port) as talk:
                await talk.send(chat_request(fields=[PARENT]))
                await talk.read_until(b"received")
            proxy.process.terminate()
            assert await proxy.ended() == 0
        server, sent = sink.spans
    assert (server.trace_id, server.parent_id) == (TRACE, SPAN)
    assert sent.parent_id == server.span_id
    assert server.resource["service.name"] == "edge"
    assert server.resource["team"] == "serving"
    events = [json.loads(line) for line in proxy.lines]
    assert any(event["event"] == "draining" for event in events)
    assert isinstance(server, Told)
