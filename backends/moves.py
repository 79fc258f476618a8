"""A replica's way between its phases, as spans of traces: each start, wake, sleep and stop is one.

A span begins when a replica leaves for somewhere and ends when it has arrived, or has not: a start
that ended in back-off failed, a sleep after which it is awake was refused. What several phases are
parts of (EMPTYING, then FALLING_ASLEEP) is one move. Each is a trace of its own: no request is its
parent, though many may wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final, Protocol

import msgspec

from backends.lifecycle import Phase
from backends.spec import ReplicaSpec
from proxy.contract.spans import INTERNAL, SpanRecord

# What a phase on the way is part of, and the phases in which that has gone well.
_MOVES: Final = MappingProxyType(
    {
        Phase.STARTING: "start",
        Phase.WAKING: "wake",
        Phase.EMPTYING: "sleep",
        Phase.FALLING_ASLEEP: "sleep",
        Phase.DRAINING: "stop",
        Phase.STOPPING: "stop",
        Phase.KILLING: "stop",
    }
)
_ARRIVED: Final = MappingProxyType(
    {
        "start": (Phase.READY, Phase.HELD),
        "wake": (Phase.READY, Phase.HELD),
        "sleep": (Phase.ASLEEP, Phase.SUSPENDED),
        "stop": (Phase.STOPPED, Phase.STARTING),  # started anew at once
    }
)


class Step(msgspec.Struct, frozen=True):
    """A replica has gone from one phase to another."""

    spec: ReplicaSpec
    phase: Phase
    cause: str
    reason: str
    rung: str  # where it stood
    at_s: float  # Unix time


class Follows(Protocol):
    """Whoever is told of the steps of replicas."""

    def step(self, step: Step) -> None:
        """Something has moved. Nothing is raised."""


class Nobody:
    """Traces are off."""

    def step(self, step: Step) -> None:
        """Nobody wants to know."""


class Moves:
    """All moves under way, at most one for each replica. `put` takes those that are over."""

    def __init__(self, put: Callable[[SpanRecord], None], draw: Callable[[int], int]) -> None:
        """`draw(n)` gives n random octets as a number."""
        self._put = put
        self._draw = draw
        self._under_way: dict[str, tuple[str, Step]] = {}

    def step(self, step: Step) -> None:
        """End the move that this ends, and begin the one that it begins."""
        replica_id, move = step.spec.replica_id, _MOVES.get(step.phase)
        name, begun = self._under_way.get(replica_id, ("", None))
        if name == move:
            return
        if begun is not None:
            del self._under_way[replica_id]
            self._put(self._span(name, begun, step))
        if move is not None:
            self._under_way[replica_id] = move, step

    def _span(self, move: str, begun: Step, ended: Step) -> SpanRecord:
        spec = begun.spec
        span = SpanRecord(
            f"replica {move}",
            INTERNAL,
            trace_id=self._draw(16),
            span_id=self._draw(8),
            start_ns=int(begun.at_s * 1e9),
            end_ns=int(ended.at_s * 1e9),
            attributes={
                "doherty.replica": spec.replica_id,
                "doherty.model": spec.model,
                "doherty.pool": spec.pool,
                "doherty.engine": spec.engine,
                "doherty.rung": begun.rung,
                "doherty.cause": begun.cause,
                "doherty.reason": begun.reason,
                "doherty.phase": str(ended.phase),
            },
        )
        if ended.phase not in _ARRIVED[move]:
            span.error = ended.reason or f"it is {ended.phase.words}"
            span.attributes["error.type"] = ended.cause
        return span
