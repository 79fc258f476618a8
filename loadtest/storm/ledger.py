"""What became of one request, judged from the octets that came back. Pure.

Every event carries its request's token and its number, so a reader can prove what it was given:
whose events, which, in what order, and whether all of them. The judgement of the whole adds what
the engines wrote down and which faults struck: an end that no fault explains is a loss, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from loadtest.scripts import Script, event, whole_body
from loadtest.storm.caller import Ending
from loadtest.wire import AnswerReader

if TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method):  # typing.override is Python 3.12's
        return method


_EVENT = re.compile(rb'data: \{"choices":\[\{"index":0,"delta":\{"content":"([^:"]+):([0-9]+) ')
# A request may be on its way to a process that is just gone: the proxy learns of it a little later.
LEARNING_S = 0.25

BROKEN = ("lost", "mixed", "duplicated", "reordered", "spoiled", "silent")
OUTCOMES = ("complete", "cut: event", "cut: close", "failed", *BROKEN)


class TokenReader(AnswerReader):
    """Reads an answer and keeps account of its events."""

    __slots__ = ("_script", "count", "fault", "told_s")

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script
        self.count = 0  # of events, in order
        self.fault = ""  # the first word of BROKEN that an event deserved
        self.told_s = 0.0  # when an error event said that the stream is cut

    @override
    def _event(self, event_octets: bytes, now_s: float) -> None:
        match = _EVENT.match(event_octets)
        if match is None:
            super()._event(event_octets, now_s)
            if self.stream_error and not self.told_s:
                self.told_s = now_s
            return
        index = int(match[2])
        if match[1] != self._script.token.encode():
            self._accuse("mixed")
        elif index < self.count or self.done_seen:
            self._accuse("duplicated")
        elif index > self.count:
            self._accuse("reordered")
        elif event_octets != event(self._script, index):
            self._accuse("spoiled")
        self.count = index + 1

    def _accuse(self, word: str) -> None:
        self.fault = self.fault or word


class Seen(msgspec.Struct, kw_only=True):
    """One request as its client saw it."""

    script: Script
    reader: TokenReader
    begun_s: float
    ended_s: float = 0.0  # the end of the exchange on the wire
    ending: Ending = Ending.NEVER
    outcome: str = ""
    detail: str = ""
    engine: str = ""  # that was asked without a proxy between

    @property
    def visible_s(self) -> float:
        """When the client could tell that no more will come."""
        return self.reader.told_s or self.ended_s

    def late_s(self, strike: Strike) -> float:
        """Return how long after a fault its reader could tell."""
        return max(0.0, self.visible_s - strike.at_s)

    @property
    def replica(self) -> str:
        return self.engine or self.reader.headers.get("x-doherty-replica", "")


def direct_latencies(all_seen: Sequence[Seen], strikes: Strikes) -> list[float]:
    """Return how late the ends of cut streams were seen that had no proxy between."""
    found = []
    for seen in all_seen:
        strike = strikes.of(seen)
        if seen.ending in (Ending.CLOSED, Ending.RESET) and strike is not None:
            found += [seen.late_s(strike)] if strike.at_s >= seen.begun_s else []
    return found


class Strike(msgspec.Struct, frozen=True):
    """A fault as whoever did it saw it: of one request's connection, or of a whole process."""

    at_s: float
    what: str
    # A process that is killed takes connections until its kernel has torn it down.
    over_s: float = 0.0


def outcome(seen: Seen) -> tuple[str, str]:
    """Return a word of OUTCOMES and a detail, from the client's view alone."""
    reader, script = seen.reader, seen.script
    if seen.ending is Ending.GARBLED:
        return "mixed", "octets that are no part of the answer"
    if seen.ending is Ending.NEVER:
        return "lost", "no end in the time allowed"
    if reader.fault:
        return reader.fault, f"after {reader.count} events"
    if reader.status == 502 and reader.headers.get("x-should-retry") == "true":
        return ("failed", "502") if seen.ending is Ending.WHOLE else ("lost", "502, cut")
    if reader.status != 200:
        return "lost", f"status {reader.status}, {seen.ending.value}"
    if reader.stream_error:
        return "cut: event", seen.ending.value
    if seen.ending is not Ending.WHOLE:
        return "cut: close", seen.ending.value
    return _whole_outcome(script, reader)


def _whole_outcome(script: Script, reader: TokenReader) -> tuple[str, str]:
    """Judge an answer that is all there is, by HTTP's word."""
    if script.stream:
        whole = reader.done_seen and reader.count == script.events
        return (
            ("complete", "") if whole else ("silent", f"{reader.count} of {script.events} events")
        )
    if reader.body == whole_body(script):
        return "complete", ""
    if not whole_body(script).startswith(reader.body):
        return ("spoiled" if script.token.encode() in reader.body else "mixed"), "another body"
    return "silent", f"{len(reader.body)} octets of a body"


class Strikes(msgspec.Struct, kw_only=True):
    """All faults, by what they struck."""

    requests: dict[str, Strike] = {}  # by token
    replicas: dict[str, list[Strike]] = {}

    def of(self, seen: Seen) -> Strike | None:
        """Return the fault that struck a request, or None when none did."""
        own = self.requests.get(seen.script.token)
        if own is not None:
            return own
        for strike in self.replicas.get(seen.replica, ()):
            over_s = max(strike.at_s, strike.over_s) + LEARNING_S
            if seen.begun_s <= over_s and strike.at_s <= seen.ended_s:
                return strike
        return None


class Tally(msgspec.Struct, kw_only=True):
    """The whole of a storm."""

    streams: int = 0
    counts: dict[str, int] = {}
    twice: int = 0  # requests that engines were given more than once
    spoiled_bodies: int = 0  # request bodies that an engine got otherwise than they were sent
    latencies_s: dict[str, list[float]] = {}  # from a fault to its reader's notice, by what it was
    direct_s: list[float] = []  # the same, of streams without a proxy between
    details: list[str] = []  # of what must not be


def judge(
    all_seen: Sequence[Seen],
    strikes: Strikes,
    deliveries: dict[str, int],
    spoiled_bodies: int,
) -> Tally:
    """Count what became of the requests; sets `outcome` and `detail` of each."""
    tally = Tally(streams=len(all_seen), counts=dict.fromkeys(OUTCOMES, 0))
    tally.spoiled_bodies = spoiled_bodies
    tally.twice = sum(count > 1 for count in deliveries.values())
    for seen in all_seen:
        seen.outcome, seen.detail = outcome(seen)
        if seen.outcome in ("cut: event", "cut: close", "failed"):
            strike = strikes.of(seen)
            if strike is None:
                seen.detail = f"{seen.outcome} ({seen.detail}) and no fault had struck it"
                seen.outcome = "lost"
            elif strike.at_s >= seen.begun_s:
                tally.latencies_s.setdefault(strike.what, []).append(seen.late_s(strike))
        tally.counts[seen.outcome] += 1
        if seen.outcome in BROKEN:
            tally.details.append(
                f"{seen.outcome}: {seen.script.token} on {seen.replica or 'none'}, "
                f"{seen.script.framing}: {seen.detail}"
            )
    return tally
