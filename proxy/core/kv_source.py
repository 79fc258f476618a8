"""Where an engine's KV events are to be had, and in what order they are right.

vLLM says it at `/kv_event_sources`, by rank; SGLang in `/server_info`, as the port of rank 0. An
engine knows its own addresses only as it was told them: what means "all interfaces" or "this
machine" there is, seen from here, the host that we reach the engine by.

`KvSequence` is the rule for what comes. Numbers without a hole are one story; a hole is asked for
again; and a number that was there before, with a later time, begins a new life of the engine.
Whether a replay goes on in the story is seen by its first batch: the last that we have must be the
same one.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple

import msgspec

_ENDPOINT: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.*_-]{1,253}):([0-9]{1,5})")
_NOT_AN_ADDRESS: Final = re.compile(r"\*|0\.0\.0\.0|\[?::1?\]?|localhost|127\.[0-9.]+|")
_PORT_MAX: Final = 65535


class KvSource(NamedTuple):
    """Where the events of one engine's rank are. Without `replay`, what is missed is lost."""

    endpoint: str
    replay: str
    topic: str


class _Listed(msgspec.Struct):
    endpoint: str
    replay_endpoint: str | None = None
    topic: str | None = None


class _Named(msgspec.Struct):
    endpoint_port_base: int
    endpoint_host: str | None = None
    replay_endpoint_port_base: int | None = None
    topic: str | None = None
    dp_size: int = 1


class _ServerInfo(msgspec.Struct):
    kv_events: _Named | None = None


_listed: Final = msgspec.json.Decoder(dict[str, _Listed])
_info: Final = msgspec.json.Decoder(_ServerInfo)


def listed_source(body: bytes, host: str, rank: int | None) -> KvSource | None:
    """Read vLLM's list. None: it has none for this rank, or several where no rank is meant."""
    try:
        sources = _listed.decode(body)
    except msgspec.MsgspecError as error:
        raise ValueError(f"no list of KV event sources: {error}") from None
    if rank is None:
        found = next(iter(sources.values())) if len(sources) == 1 else None
    else:
        found = sources.get(str(rank))
    if found is None:
        return None
    return KvSource(
        seen_from_here(found.endpoint, host),
        seen_from_here(found.replay_endpoint, host) if found.replay_endpoint else "",
        found.topic or "",
    )


def named_source(body: bytes, host: str, rank: int | None) -> KvSource | None:
    """Read SGLang's server info."""
    try:
        told = _info.decode(body).kv_events
    except msgspec.MsgspecError as error:
        raise ValueError(f"no server info: {error}") from None
    if told is None or (rank is None and told.dp_size > 1):
        return None
    at = told.endpoint_host or ""
    at = f"[{at}]" if ":" in at and not at.startswith("[") else at or "*"
    replay = told.replay_endpoint_port_base
    return KvSource(
        seen_from_here(f"tcp://{at}:{told.endpoint_port_base}", host, rank or 0),
        seen_from_here(f"tcp://{at}:{replay}", host, rank or 0) if replay else "",
        told.topic or "",
    )


def seen_from_here(endpoint: str, host: str, offset: int = 0) -> str:
    """Return an endpoint as this machine reaches it, `offset` ports on. Raises `ValueError`."""
    match = _ENDPOINT.fullmatch(endpoint)
    port = int(match[2]) + offset if match else 0
    if match is None or not 0 < port <= _PORT_MAX:
        raise ValueError(f"KV events at {endpoint[:80]!r} cannot be followed: not tcp://host:port")
    name = match[1]
    if _NOT_AN_ADDRESS.fullmatch(name):
        name = f"[{host}]" if ":" in host else host
    return f"tcp://{name}:{port}"


class Verdict(enum.Enum):
    """What a numbered batch is to the story so far."""

    NEXT = enum.auto()
    REPEATED = enum.auto()
    GAP = enum.auto()
    RESTARTED = enum.auto()


class KvSequence:
    """How far the story of one engine is known."""

    __slots__ = ("expected", "last_at_s")

    def __init__(self) -> None:
        self.expected = -1  # any number begins it
        self.last_at_s = 0.0  # the engine's time of the batch before

    @property
    def replay_from(self) -> int:
        """The last batch again, to see that it is the same; or all of them."""
        return max(0, self.expected - 1)

    def begin(self) -> None:
        """Nothing is known: the next batch is the first, whatever its number."""
        self.expected = -1

    def begin_at_nothing(self) -> None:
        """The engine has said nothing yet: its first batch will be number 0."""
        self.expected = 0

    def take(self, number: int, at_s: float) -> None:
        self.expected = number + 1
        self.last_at_s = at_s

    def judge(self, number: int, at_s: float) -> Verdict:
        """Say what a batch is that was published."""
        if number == self.expected or self.expected < 0:
            return Verdict.NEXT
        if number > self.expected:
            return Verdict.GAP
        return Verdict.RESTARTED if at_s > self.last_at_s else Verdict.REPEATED

    def judge_first_replayed(self, number: int, at_s: float) -> Verdict:
        """Say the same of the first batch of a replay, asked for from `replay_from`."""
        if self.expected <= 0:
            return Verdict.NEXT
        if number >= self.expected:
            return Verdict.GAP
        if number < self.expected - 1:
            return Verdict.REPEATED  # more than was asked for
        return Verdict.REPEATED if at_s == self.last_at_s else Verdict.RESTARTED
