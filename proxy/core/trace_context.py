"""Whose trace a request belongs to (W3C Trace Context, Level 2), and whether it is recorded.

The fields come from a client, so they are judged like everything in a head: what is not plainly
right is dropped and a new trace begun (§4.3), never passed on, and never the request's fault. With
tracing off nobody reads them; they go on to the replica as they came.

Whether a trace is recorded is decided once, where it begins, so that it is whole or not there at
all: a client that says is followed, else the lot is drawn from the trace's id, which every service
that samples by the same share draws alike (OpenTelemetry, TraceIdRatioBased).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"
FIELDS: Final = (TRACEPARENT, TRACESTATE)

SAMPLED: Final = 0x01
RANDOM: Final = 0x02  # the id is random, so that lots may be drawn from it (§3.2.3.2)
_VERSION_FF: Final = b"ff"  # never valid (§3.2.2.1)
# Lower case only (§3.2.2). A later version may say more behind another dash (§3.2.4).
_PARENT: Final = re.compile(
    rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?"
)
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16

# §3.3.1: members, each a key and a value; the values hold printable characters but , and =.
_MEMBER: Final = re.compile(
    rb"([a-z0-9][a-z0-9_\-*/@]{0,255})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)
_MEMBERS_MAX: Final = 32
_STATE_BYTES_MAX: Final = 8192  # 512 at least are to be passed on (§3.3.1.5)


class Origin:
    """A trace that a client is already in: its ids in hexadecimal, its flags, its state."""

    __slots__ = ("flags", "parent_id", "state", "trace_id")

    def __init__(self, trace_id: bytes, parent_id: bytes, flags: int, state: bytes) -> None:
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.flags = flags
        self.state = state


def read_origin(fields: Sequence[tuple[bytes, bytes]]) -> Origin | None:
    """Return what the trace fields of a head say; None: nothing that can be believed.

    `fields` has none but those two. Without a parent the state means nothing (§4.3).
    """
    parents = [value for name, value in fields if name == TRACEPARENT]
    match = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if match is None:
        return None
    version, trace_id, parent_id, flags, more = match.groups()
    if version == _VERSION_FF or (version == b"00" and more is not None):
        return None
    if trace_id == _NO_TRACE or parent_id == _NO_SPAN:
        return None
    state = read_state([value for name, value in fields if name == TRACESTATE])
    return Origin(trace_id, parent_id, int(flags, 16), state)


def read_state(values: Sequence[bytes]) -> bytes:
    """Return the members of all `tracestate` fields, in their order; empty where one is wrong.

    A list that cannot be read is dropped as a whole, and the trace goes on without (§3.3.1.1).
    """
    joined = b",".join(values)
    if not joined or len(joined) > _STATE_BYTES_MAX:
        return b""
    members: dict[bytes, bytes] = {}
    for each in joined.split(b","):
        member = each.strip(b" \t")
        if not member:
            continue  # empty ones are allowed
        match = _MEMBER.fullmatch(member)
        if match is None or match[1] in members:
            return b""
        members[match[1]] = member
    return b",".join(members.values()) if len(members) <= _MEMBERS_MAX else b""


def written(trace_id: bytes, span_id: bytes, flags: int, state: bytes) -> bytes:
    """Return the fields by which a replica knows its parent, with their line ends."""
    line = b"traceparent: 00-%b-%b-%02x\r\n" % (trace_id, span_id, flags & (SAMPLED | RANDOM))
    return b"%btracestate: %b\r\n" % (line, state) if state else line


class Sampler:
    """Which traces are recorded: `share` of those that begin here.

    `follows` is whether a client that is in a trace is followed in what it says of that.
    """

    __slots__ = ("_bound", "follows", "share")

    def __init__(self, share: float, *, follows: bool = True) -> None:
        self.share = share
        self.follows = follows
        self._bound = round(share * (1 << 64))

    def records(self, trace_id: bytes, origin: Origin | None) -> bool:
        """Say whether this trace is recorded here."""
        if origin is not None and self.follows:
            return origin.flags & SAMPLED != 0
        return int(trace_id[16:], 16) < self._bound


def sampler_of(ratio: float | None, environment: Mapping[str, str]) -> tuple[Sampler, str]:
    """Return what the configuration or, if that says nothing, the environment asks for.

    With it comes what is wrong with the environment, in words: the environment is that of many
    services, so what is not known here is told and otherwise passed over, as OpenTelemetry has it
    ("Environment Variable Specification"), whose names these are.
    """
    if ratio is not None:
        return Sampler(ratio), ""
    name = environment.get("OTEL_TRACES_SAMPLER", "").strip() or "parentbased_always_on"
    parent, kind = name.startswith("parentbased_"), name.removeprefix("parentbased_")
    if kind == "always_on":
        return Sampler(1.0, follows=parent), ""
    if kind == "always_off":
        return Sampler(0.0, follows=parent), ""
    if kind != "traceidratio":
        return Sampler(1.0), f"OTEL_TRACES_SAMPLER: {name!r} is not known here; all are recorded"
    text = environment.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or "1.0"
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        wrong = f"OTEL_TRACES_SAMPLER_ARG: {text!r} is no number from 0 to 1; all are recorded"
        return Sampler(1.0, follows=parent), wrong
    return Sampler(share, follows=parent), ""
