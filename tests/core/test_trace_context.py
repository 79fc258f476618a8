"""What of a client's trace is believed, and which traces are recorded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy.core.trace_context import (
    RANDOM,
    SAMPLED,
    Origin,
    Sampler,
    read_origin,
    read_state,
    sampler_of,
    written,
)

TRACE, SPAN = b"0af7651916cd43dd8448eb211c80319c", b"b7ad6b7169203331"
GOOD = b"00-%b-%b-01" % (TRACE, SPAN)


def origin(*values: bytes, state: tuple[bytes, ...] = ()) -> Origin | None:
    fields = [(b"traceparent", value) for value in values]
    return read_origin([*fields, *[(b"tracestate", value) for value in state]])


def test_a_parent_is_read() -> None:
    found = origin(GOOD, state=(b"a=1, b=2",))
    assert found is not None
    assert (found.trace_id, found.parent_id, found.flags, found.state) == (
        TRACE, SPAN, SAMPLED, b"a=1,b=2",
    )  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        GOOD.upper(),  # §3.2.2: lower case
        b" " + GOOD,
        GOOD + b" ",
        GOOD + b"-more",  # version 00 ends here
        GOOD + b"0",
        GOOD[:-1],
        b"ff" + GOOD[2:],  # never a version
        b"0x" + GOOD[2:],
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-0g" % (TRACE, SPAN),
        b"00-%b-%b-01" % (TRACE[:-1], SPAN + b"0"),
        b"00_%b_%b_01" % (TRACE, SPAN),
        b"01-%b-%b-01more" % (TRACE, SPAN),  # §3.2.4: what follows begins with a dash
        b"00-%b-%b-01,00-%b-%b-01" % (TRACE, SPAN, TRACE, SPAN),
        b"00-" + b"a" * 9000,
    ],
)
def test_what_is_not_plainly_right_is_dropped(value: bytes) -> None:
    assert origin(value, state=(b"a=1",)) is None


def test_of_two_parents_neither_is_believed() -> None:
    assert origin(GOOD, GOOD) is None
    assert origin(state=(b"a=1",)) is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    for value in (b"cc" + GOOD[2:], b"cc" + GOOD[2:] + b"-what-comes.then"):
        found = origin(value)
        assert found is not None
        assert (found.trace_id, found.parent_id, found.flags) == (TRACE, SPAN, SAMPLED)


@given(
    st.binary(max_size=80) | st.from_regex(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.?")
)
def test_opentelemetry_believes_what_is_believed_here(value: bytes) -> None:
    found = origin(value)
    if found is not None:
        assert len(found.trace_id) == 32
        assert int(found.trace_id, 16)
        assert int(found.parent_id, 16)
        again = origin(written(found.trace_id, found.parent_id, found.flags, b"")[13:-2])
        assert again is not None
        assert again.trace_id == found.trace_id
        context = TraceContextTextMapPropagator().extract({"traceparent": value.decode("ascii")})
        (span,) = context.values()
        assert span.get_span_context().trace_id == int(found.trace_id, 16)  # type: ignore[attr-defined]


def test_the_state_is_kept_in_order_or_dropped_as_a_whole() -> None:
    assert read_state([b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", b"", b"@x=2"]) == b""
    assert read_state([b" a=1 ,, b@c=2 ", b"0d=~ ~"]) == b"a=1,b@c=2,0d=~ ~"
    assert read_state([b"a=1,a=2"]) == b""  # §3.3.1.3: one for each key
    assert read_state([b"A=1"]) == b""
    assert read_state([b"a=1=2"]) == b""
    assert read_state([b"a="]) == b""
    assert read_state([b"a=" + b"v" * 256]) == b"a=" + b"v" * 256
    assert read_state([b"a=" + b"v" * 257]) == b""
    members = [b"k%d=v" % number for number in range(33)]
    assert read_state([b",".join(members[:32])]) == b",".join(members[:32])
    assert read_state([b",".join(members)]) == b""
    assert read_state([]) == b""


def test_the_replica_gets_only_flags_that_are_known() -> None:
    assert written(TRACE, SPAN, 0xFF, b"") == b"traceparent: 00-%b-%b-03\r\n" % (TRACE, SPAN)
    assert written(TRACE, SPAN, 0, b"a=1") == (
        b"traceparent: 00-%b-%b-00\r\ntracestate: a=1\r\n" % (TRACE, SPAN)
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 1.0])
def test_lots_are_drawn_as_every_other_service_draws_them(share: float) -> None:
    draw, theirs = random.Random(7), TraceIdRatioBased(share)
    ids = [draw.getrandbits(128) for _ in range(500)] + [1, (1 << 128) - 1]
    for trace_id in ids:
        due = theirs.should_sample(None, trace_id, "x").decision is Decision.RECORD_AND_SAMPLE
        assert Sampler(share).records(b"%032x" % trace_id, None) is due


def test_a_client_in_a_trace_is_followed() -> None:
    none, whole = Sampler(0.0), Sampler(1.0)
    assert none.records(TRACE, Origin(TRACE, SPAN, SAMPLED | RANDOM, b""))
    assert not whole.records(TRACE, Origin(TRACE, SPAN, RANDOM, b""))
    assert Sampler(1.0, follows=False).records(TRACE, Origin(TRACE, SPAN, 0, b""))


@pytest.mark.parametrize(
    ("name", "text", "share", "follows"),
    [
        ("", "", 1.0, True),
        ("always_on", "", 1.0, False),
        ("always_off", "", 0.0, False),
        ("parentbased_always_off", "", 0.0, True),
        ("parentbased_traceidratio", "0.25", 0.25, True),
        ("traceidratio", "0.5", 0.5, False),
        ("traceidratio", "", 1.0, False),
    ],
)
def test_the_environment_names_the_sampler(
    name: str, text: str, share: float, follows: bool
) -> None:
    environment = {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": text}
    sampler, wrong = sampler_of(None, environment)
    assert (sampler.share, sampler.follows, wrong) == (share, follows, "")
    sampler, wrong = sampler_of(0.1, environment)  # the configuration goes before it
    assert (sampler.share, sampler.follows, wrong) == (0.1, True, "")


def test_a_sampler_that_is_not_known_is_told_and_passed_over() -> None:
    sampler, wrong = sampler_of(None, {"OTEL_TRACES_SAMPLER": "jaeger_remote"})
    assert sampler.share == 1.0
    assert "jaeger_remote" in wrong
    for text in ("2", "-1", "nan", "half"):
        environment = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": text}
        assert text in sampler_of(None, environment)[1]
