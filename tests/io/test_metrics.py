"""The metrics of the proxy: declared once, counted where they belong, and read by real readers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)

from proxy.io.exposition import render_metrics
from proxy.io.families import FAMILIES
from proxy.io.telemetry import Sample, Telemetry
from tests.fakes.plane import CHAT_BODY, EVENTS, STREAM_HEAD, Bench, answer, chat_request, chunk

_PROXY = Path(__file__).parents[2] / "proxy"
_STREAMED = CHAT_BODY[:-1] + b',"stream":true}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":%d}}\n\n'


def _words() -> Iterator[str]:
    """Yield every constant text of the proxy's code, and the ends of those put together."""
    for path in _PROXY.rglob("*.py"):
        if path.name == "families.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                ends = [v.value for v in node.values if isinstance(v, ast.Constant)]
                yield "*".join(map(str, ends))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_what_is_declared_is_what_is_counted() -> None:
    words = set(_words())
    put_together = {"deadline_met_total", "deadline_missed_total", "deadline_shed_total"}
    assert "deadline_*_total" in words
    assert {name for name in FAMILIES if name not in words} == put_together
    counted = {
        node.args[0].value
        for path in _PROXY.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("Sample", "sample")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(counted) > 50
    assert counted - FAMILIES.keys() == set()


def test_a_reader_that_asks_for_openmetrics_gets_it() -> None:
    telemetry = Telemetry()
    telemetry.series("chat", "m").duration_s.observe(0.3)
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    page, kind = render_metrics(telemetry.samples(), [], accept)
    assert kind.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")
    families = {family.name: family for family in openmetrics_families(page.decode())}
    assert families["doherty_request_duration_seconds"].type == "histogram"
    assert families["process_open_fds"].samples[0].value > 0
    plain, kind = render_metrics(telemetry.samples(), [])
    assert kind.startswith("text/plain")
    assert b"# EOF" not in plain


def test_each_text_and_type_is_the_declared_one() -> None:
    samples = [
        Sample(name, tuple((label, "x") for label in family.labels), 1.0, buckets)
        for name, family in FAMILIES.items()
        for buckets in [(1,) * (len(family.edges) + 1) if family.edges else ()]
    ]
    page = render_metrics(samples, [])[0].decode()
    for name, family in FAMILIES.items():
        assert f"# HELP doherty_{name} {family.text}.\n" in page
        assert f"# TYPE doherty_{name} {family.kind}\n" in page


def _total(bench: Bench, name: str) -> tuple[int, float]:
    """Return count and sum of a histogram over all its series."""
    found = [sample for sample in bench.plane.counters() if sample.name == name]
    assert found
    return sum(sum(sample.buckets) for sample in found), sum(sample.value for sample in found)


async def _stream(bench: Bench, tokens: int, length_s: float, *, usage: bool = True) -> None:
    client = bench.client()
    client.send(chat_request(_STREAMED))
    await bench.settle()
    engine = bench.upstreams.engines[0]
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    bench.clock.advance(length_s)
    engine.send(chunk(USAGE % tokens if usage else EVENTS[1]) + chunk(EVENTS[-1]) + b"0\r\n\r\n")
    await bench.settle()
    assert client.answer().status == 200


async def test_time_per_output_token_is_the_mean_of_a_stream(bench: Bench) -> None:
    await _stream(bench, tokens=11, length_s=0.5)
    for name in ("time_per_output_token_seconds", "class_time_per_output_token_seconds"):
        count, total_s = _total(bench, name)
        assert (count, total_s) == (1, pytest.approx(0.05))
    await _stream(bench, tokens=3, length_s=1.0)
    count, total_s = _total(bench, "time_per_output_token_seconds")
    assert (count, total_s) == (2, pytest.approx(0.05 + 0.5))


async def test_what_shows_no_pace_has_no_time_per_output_token(bench: Bench) -> None:
    await _stream(bench, tokens=1, length_s=1.0)  # one token has no next one
    await _stream(bench, tokens=9, length_s=1.0, usage=False)  # nobody knows how many
    client = bench.client()
    client.send(chat_request())  # what comes in one piece shows only how long all took
    await bench.settle()
    body = b'{"usage":{"prompt_tokens":7,"completion_tokens":9}}'
    bench.upstreams.engines[0].send(answer(body))
    await bench.settle()
    assert client.answer().status == 200
    for name in ("time_per_output_token_seconds", "class_time_per_output_token_seconds"):
        assert _total(bench, name) == (0, 0.0)
    assert _total(bench, "time_to_first_token_seconds")[0] == 3
