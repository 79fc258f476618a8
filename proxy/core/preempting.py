"""Which requests of offline work have to go where they have begun, so that online work can begin.

What offline work has sent to a replica stands in its line, holds one of its places and some of its
KV cache. Where that makes an online request wait, the youngest of it gives way: least of it has
been computed, and it had waited least. Only what has brought no octet of an answer may be ended,
since nobody has seen anything of it; and only where the online request can go then, since a place
that is cleared in vain costs the work and helps nobody. Of several replicas it is the one where
fewest have to go.

Each decision is the same wherever it is made of the same figures: nothing is drawn, and of equals
the last that was dispatched goes first.

Where it is another worker's work that has to go, that is asked, and its end has to be told before
the place can be taken. Until then no worker sends offline work there: who gave way would be the
first to see the room that he made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from proxy.core import limits
from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.core.policy import Request

_Order = tuple[int, float, int]
_NOTHING: Final[list[Lease]] = []


def who_gives_way(
    request: Request,
    slots: Iterable[int],
    unanswered: Sequence[Lease],
    picture: Picture,
    now_s: float,
) -> list[Lease]:
    """Return the leases to end so that one of `slots` may take the request; none where it is vain.

    `unanswered` are those that may be ended, in the order in which they were dispatched.
    """
    there: dict[int, list[Lease]] = {}
    for lease in reversed(unanswered):
        there.setdefault(lease.slot, []).append(lease)
    best: list[Lease] = _NOTHING
    best_order: _Order = (0, 0.0, 0)
    for slot in slots:
        leaving = _leaving(request, slot, there.get(slot, _NOTHING), picture, now_s)
        if leaving:
            youngest = leaving[0]
            order = (len(leaving), -youngest.started_s, -youngest.lease_id)
            if not best or order < best_order:
                best, best_order = leaving, order
    return best


def _leaving(
    request: Request, slot: int, youngest: list[Lease], picture: Picture, now_s: float
) -> list[Lease]:
    """Return the fewest of these, the youngest first, without which the replica would be open."""
    prospect = _Relief(request, slot, picture, now_s)
    leaving: list[Lease] = []
    if not youngest or prospect.opens():  # what it waits for is not this
        return leaving
    for lease in youngest[: limits.PREEMPTED_TOGETHER_MAX]:
        leaving.append(lease)
        prospect.without(lease)
        if prospect.opens():
            return leaving
    return _NOTHING


class _Relief:
    """A replica's figures, as they would be without some of its leases."""

    __slots__ = (
        "_extra_s", "_free_tokens", "_inflight", "_loads", "_needed_tokens", "_queued_tokens",
        "_slot", "_wait_s",
    )  # fmt: skip

    def __init__(self, request: Request, slot: int, picture: Picture, now_s: float) -> None:
        loads = picture.loads
        loads.prefilling.settle(slot, now_s)
        self._loads = loads
        self._slot = slot
        self._inflight = loads.inflight[slot]
        self._wait_s = loads.wait_s(slot, now_s)
        self._extra_s = loads.extra_s[slot]
        self._queued_tokens = loads.prefilling.queued_tokens(slot)
        self._free_tokens = loads.free_tokens[slot]
        self._needed_tokens = picture.tokens_of(request.chain.prompt_bytes, slot)

    def without(self, lease: Lease) -> None:
        loads, slot = self._loads, self._slot
        self._inflight -= 1
        self._free_tokens += lease.prompt_tokens
        if lease.pending:
            self._queued_tokens -= lease.prefill_tokens
            self._wait_s -= lease.prefill_tokens * loads.s_per_token[slot]
        if loads.running_max[slot]:
            self._extra_s -= loads.request_s[slot] / loads.running_max[slot]

    def opens(self) -> bool:
        """As `core.opening.is_open` judges it, of what would be."""
        loads, slot = self._loads, self._slot
        if loads.inflight_max[slot] and self._inflight >= loads.inflight_max[slot]:
            return False
        room_tokens = loads.tokens_max[slot] - self._needed_tokens
        if loads.tokens_max[slot] and self._queued_tokens > max(0, room_tokens):
            return False
        if self._inflight <= 0:
            return True
        wait_s = max(0.0, self._wait_s) + max(0.0, self._extra_s)
        if slot in loads.tight and self._needed_tokens > self._free_tokens:
            return False
        return wait_s <= limits.RUNWAY_S


class Clearing:
    """The replicas that another worker's online work waits for, kept clear for a moment."""

    __slots__ = ("_bits", "end_s")

    def __init__(self) -> None:
        self._bits = 0
        self.end_s = 0.0

    def keep(self, slot: int, now_s: float) -> None:
        self._bits = self.bits(now_s) | 1 << slot
        self.end_s = now_s + limits.GIVE_WAY_S

    def bits(self, now_s: float) -> int:
        """Return them, as bits of their slots."""
        if self._bits and now_s >= self.end_s:
            self._bits = 0
        return self._bits
