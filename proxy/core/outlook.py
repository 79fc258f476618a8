"""What a request would meet in another region, by its last summary and what went there since.

A summary is some time old when it is read: what it says of waiting has passed by its age, and what
we sent since it was written is not in it yet. So both are counted here, for each remote proxy and
each model: `room` is how many requests more it would begin at once, `wait_s` how long one would
wait there. A request counts as not in the summary until it is over, or one has come that must have
been begun after it arrived: perhaps too long, and never too short, so that nobody is sent after
what is gone.

A region whose summary is old, that drains, or that cannot be reached, is left at once. One that was
gone and is back is given its requests by degrees (`returning_max`): a pure function of how long it
has been back.
"""

from __future__ import annotations

from typing import Final

from proxy.contract.regions import (
    SUMMARY_AGE_S_MAX,
    SUMMARY_INTERVAL_S,
    ModelSummary,
    RemoteState,
)
from proxy.core import claim_limits, limits
from proxy.core.lease import Lease

NOTHING_SAID: Final = ModelSummary()


def returning_max(most: int, back_s: float) -> int:
    """Return how many of `most` requests a region may have that has been back for so long."""
    if back_s >= claim_limits.REGION_RETURN_S:
        return most
    return 1 + int(most * max(0.0, back_s) / claim_limits.REGION_RETURN_S)


class Sent:
    """What went to one region for one model of late, through whichever of its proxies.

    They have the same replicas, so what one of them was sent is not in the summaries of the others.
    """

    __slots__ = ("leases", "readers")

    def __init__(self) -> None:
        self.leases: dict[Lease, None] = {}  # in the order of their dispatch
        self.readers: list[Outlook] = []

    def add(self, lease: Lease) -> None:
        self.leases[lease] = None
        for reader in self.readers:
            reader.unseen += 1
            reader.unseen_tokens += lease.prefill_tokens

    def drop(self, lease: Lease) -> None:
        """It is over, so it takes nothing any more, whatever the next summary says."""
        if lease in self.leases:
            del self.leases[lease]
            for reader in self.readers:
                if lease.started_s >= reader.shown_s:
                    reader.unseen -= 1
                    reader.unseen_tokens -= lease.prefill_tokens

    def trim(self) -> None:
        """Forget what the summaries of all that tell have."""
        linked = [reader.shown_s for reader in self.readers if reader.linked]
        shown_s = min(linked) if linked else 0.0
        for lease in list(self.leases):
            if lease.started_s >= shown_s:
                break
            del self.leases[lease]


class Outlook:
    """One remote proxy and one model, as they were told, and what was sent there since."""

    __slots__ = (
        "_pauses", "_refused_until_s", "_suspect_until_s", "at_s", "draining", "left_s", "linked",
        "lost",
        "round_trip_s", "said", "sent", "since_s", "unseen", "unseen_tokens",
    )  # fmt: skip

    def __init__(self, sent: Sent | None = None) -> None:
        """`sent` is that of its region and the model."""
        self.said = NOTHING_SAID
        self.linked = False  # and tells of the model
        self.draining = False
        self.lost = False  # it was linked once, and then was not
        self.since_s = 0.0
        self.left_s = 0.0  # when its link was lost; 0: it is there
        self.at_s = 0.0
        self.round_trip_s = 0.0
        self.sent = sent if sent is not None else Sent()
        self.sent.readers.append(self)
        self.unseen = self.unseen_tokens = 0  # of what was sent, what its summary has not
        self._suspect_until_s = self._refused_until_s = 0.0
        self._pauses = 0

    def know(self, state: RemoteState, said: ModelSummary | None) -> None:
        """This is what is known of it now; None: it does not speak of the model."""
        summary = state.summary
        linked = state.linked and said is not None
        draining = self.draining if summary is None else summary.draining
        if (self.linked and not linked) or draining:
            self.lost = True
        if linked and not self.linked:
            self._pauses = 0
            self._suspect_until_s = self._refused_until_s = 0.0
        self.linked, self.draining, self.left_s = linked, draining, state.left_s
        self.since_s, self.at_s = state.since_s, state.at_s
        self.round_trip_s = state.round_trip_s
        if said is not None:
            self.said = said
        self._count()

    def suspect(self, now_s: float) -> None:
        """It could not be reached: go there no more for a while, whatever it tells.

        All that find so at once are one.
        """
        if now_s < self._suspect_until_s:
            return
        self._pauses = min(self._pauses + 1, claim_limits.REGION_PAUSES_COUNTED_MAX)
        self._suspect_until_s = now_s + claim_limits.REGION_PAUSE_S * 2.0 ** (self._pauses - 1)

    def refused(self, now_s: float) -> None:
        """It sent somebody away, or lost him: its next summaries will say how it is."""
        self._refused_until_s = now_s + claim_limits.REGION_PAUSE_S

    def answered(self) -> None:
        """It has answered a request."""
        self._pauses = 0

    def leave(self) -> None:
        """It is there no more."""
        self.sent.readers.remove(self)

    @property
    def shown_s(self) -> float:
        """Since when what was sent may not be in the summary.

        What it is made of may be an interval old when it is written; it was half a round trip on
        its way, and a request for which a connection had to be made, one and a half.
        """
        return self.at_s - 2.0 * self.round_trip_s - SUMMARY_INTERVAL_S

    def _count(self) -> None:
        """Count anew what the summary does not show."""
        shown_s = self.shown_s
        self.unseen = self.unseen_tokens = 0
        for lease in self.sent.leases:
            if lease.started_s >= shown_s:
                self.unseen += 1
                self.unseen_tokens += lease.prefill_tokens
        self.sent.trim()

    # --- what one more request would meet ----------------------------------------------------

    def returns_soon(self, now_s: float) -> bool:
        """Whether it has only just been lost, as in the moment in which its proxy is replaced."""
        if self._pauses == 1 and now_s < self._suspect_until_s:
            return True  # it could not be reached, once
        lately = self.left_s > 0.0 and now_s - self.left_s < claim_limits.REGION_LEFT_S
        return lately and not self.draining

    def why_not(self, now_s: float) -> str:
        """Return why nothing is sent there at all; empty: something may be."""
        if self.linked and self.draining:
            return "draining"
        if now_s < self._refused_until_s:
            return "it has just sent a request away"
        return self.gone(now_s)

    def gone(self, now_s: float) -> str:
        """Return why not even what has its state there is sent; empty: that may be."""
        if not self.linked:
            return "not linked"
        if now_s - self.at_s > SUMMARY_AGE_S_MAX:
            return "silent"
        if now_s < self._suspect_until_s:
            return "unreachable"
        return ""

    def room(self, inflight: int, now_s: float) -> int:
        """Return how many requests more it would begin at once; it has `inflight` of ours.

        It has no room for strangers while anybody waits there: those were first.
        """
        if self.said.queued:
            return 0
        return self._returning(self.said.free - self.unseen, inflight, now_s)

    def begins(self, inflight: int, now_s: float) -> bool:
        """Whether it would begin one more at once."""
        return self.said.awake > 0 and self.room(inflight, now_s) > 0

    def _returning(self, room: int, inflight: int, now_s: float) -> int:
        if not self.lost:
            return room
        most = returning_max(max(0, room) + inflight, now_s - self.since_s)
        return min(room, most - inflight)

    def takes(self, inflight: int, now_s: float) -> bool:
        """Whether it would take one for which there is nothing here, to wait if need be."""
        if not self.serves:
            return False
        if not self.lost:
            return True
        most = max(1, self.said.free) + inflight
        return inflight < returning_max(most, now_s - self.since_s)

    @property
    def serves(self) -> bool:
        """Whether it has the model awake, or brings it up."""
        return self.said.awake > 0 or self.said.coming > 0 or self.said.wakes

    def wait_s(self, now_s: float) -> float:
        """Return how long a newcomer's prefill would wait for others' there."""
        said = self.said
        ahead_s = self.unseen_tokens * self.s_per_token / max(1, said.awake)
        return max(0.0, said.wait_s - (now_s - self.at_s)) + ahead_s

    @property
    def s_per_token(self) -> float:
        return self.said.s_per_token or 1.0 / limits.PREFILL_TOKENS_PER_S_DEFAULT

    def start_s(self, now_s: float) -> float:
        """Return when something of the model should serve there; 0 where something does."""
        said = self.said
        if said.awake:
            return 0.0
        if said.coming and said.ready_in_s > 0.0:
            return max(0.0, said.ready_in_s - (now_s - self.at_s))
        return said.start_s or claim_limits.UNKNOWN_START_S


class Outlooks:
    """All of them, by the slot of the remote in the picture."""

    __slots__ = ("_sent", "of")

    def __init__(self) -> None:
        self.of: dict[int, Outlook] = {}
        self._sent: dict[tuple[str, str], Sent] = {}  # by region and model

    def open(self, slot: int, region: str, model: str) -> None:
        sent = self._sent.get((region, model))
        if sent is None:
            sent = self._sent[region, model] = Sent()
        self.of[slot] = Outlook(sent)

    def close(self, slot: int) -> None:
        found = self.of.pop(slot, None)
        if found is not None:
            found.leave()
            self._sent = {key: sent for key, sent in self._sent.items() if sent.readers}

    def dispatched(self, lease: Lease) -> None:
        """A request goes out, whoever of this region sends it."""
        found = self.of.get(lease.slot)
        if found is not None:
            found.sent.add(lease)

    def released(self, lease: Lease, now_s: float, *, refused: bool) -> bool:
        """It is over; return whether it was that of a remote."""
        found = self.of.get(lease.slot)
        if found is None:
            return False
        found.sent.drop(lease)
        if refused:
            found.refused(now_s)
        return True
