"""What the proxies of two regions tell each other: what each could take, and what it would.

A *summary* is a whole, pushed several times a second over a link; who reads it knows its age, and a
region whose summary is old is one that nothing is sent to. It says of each model what a newcomer
would meet there. It carries no prompt, no key and no name of a tenant.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

SUMMARY_INTERVAL_S = 0.25
SUMMARY_AGE_S_MAX = 1.5  # six that did not come
SUMMARY_BYTES_MAX = 1024 * 1024

WANTED_INTERVAL_S = 0.5
WANTED_AGE_S_MAX = 2.0  # of what was told last: who is cut off wants nothing any more
WANTED_BYTES_MAX = 256 * 1024

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Inputs = Annotated[float, Meta(ge=0, le=1e6)]
NAME_CHARS_MAX = 128
_Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one region has for one model, as one of its proxies sees it."""

    awake: _Count = 0  # replicas that take requests
    free: _Count = 0  # requests that these would begin at once
    wait_s: _Seconds = 0.0  # before a newcomer's prefill begins, at the best of them
    s_per_token: _Seconds = 0.0  # of prefill there; 0: not known
    queued: _Count = 0  # requests that wait in its proxies
    coming: _Count = 0  # replicas on their way up
    ready_in_s: _Seconds = 0.0  # when the next of these serves; 0: none comes, or nobody knows
    start_s: _Seconds = 0.0  # what a start takes; 0: not known
    wakes: bool = False  # demand brings replicas up
    startable: _Count = 0  # further replicas that it could start now
    carries: _Inputs = 0.0  # requests in flight that one of them is meant to have; 0: not known


class RegionSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One proxy's account of its region."""

    region: _Name
    sequence: _Count
    draining: bool = False
    models: dict[_Name, ModelSummary] = {}


class Wanted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one region asks of another: replicas for so many requests in flight, by model.

    A whole, told every `WANTED_INTERVAL_S` for as long as it is true. All proxies of a region tell
    the same, as their manager has decided it; so it is never summed over those who tell it.
    """

    region: _Name  # whose requests they are
    models: dict[_Name, _Inputs] = {}


class RemoteState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a proxy knows of one proxy of another region; its supervisor tells its workers."""

    name: str  # such as `us#0`; unlike any replica's
    region: str
    url: str
    linked: bool = False  # and its summary is young
    since_s: float = 0.0  # monotonic: since when it is linked
    left_s: float = 0.0  # monotonic: when it was lost; 0: it is linked, or never was
    round_trip_s: float = 0.0
    proxy_id: bytes = b""  # of its present life; empty: it was never linked
    at_s: float = 0.0  # monotonic: when the summary came
    summary: RegionSummary | None = None


def encode_summary(summary: RegionSummary) -> bytes:
    return msgspec.msgpack.encode(summary)


def decode_summary(octets: bytes) -> RegionSummary:
    """Return a summary; raises `msgspec.MsgspecError` when it is none."""
    return _DECODER.decode(octets)


def encode_wanted(wanted: Wanted) -> bytes:
    return msgspec.msgpack.encode(wanted)


def decode_wanted(octets: bytes) -> Wanted:
    """Return what is wanted; raises `msgspec.MsgspecError` when it is nothing of that kind."""
    return _WANTED_DECODER.decode(octets)


_DECODER = msgspec.msgpack.Decoder(RegionSummary)
_WANTED_DECODER = msgspec.msgpack.Decoder(Wanted)
