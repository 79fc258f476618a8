"""Who stands in line for prefill at each replica, and when the first in line should be done.

Engines prefill first come, first served, so the requests of a replica whose first octet is still
out stand in line; the first of them, its head, is being computed since the one before it answered,
and the part of it that must be done by now is credit. An answer that is not streamed shows no first
octet until its end: such a request leaves the line when its prefill should be over.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from proxy.core.headcount import Headcount
from proxy.core.lease import Lease
from proxy.core.speeds import Speeds

_NEVER_ZERO_S: Final = 1e-9


class Prefilling:
    """The lines of all replicas, by slot. One writer."""

    def __init__(self, speeds: Speeds) -> None:
        self.line: list[deque[Lease]] = []
        self.pending_tokens: list[int] = []  # behind the head of the line
        self.head_end_s: list[float] = []  # when the head should be done; 0: no head
        self.unseen: set[int] = set()  # slots whose head shows no first octet
        self.headcount: Headcount | None = None  # told of who leaves; None: nobody is
        self._speeds = speeds
        self._s_per_token = speeds.s_per_token
        self._head_start_s: list[float] = []

    def clear(self, slot: int) -> None:
        """A replica has taken the slot, or left it: nobody is in its line."""
        while len(self.line) <= slot:
            self.line.append(deque())
            self.pending_tokens.append(0)
            self.head_end_s.append(0.0)
            self._head_start_s.append(0.0)
        self.line[slot] = deque()
        self.pending_tokens[slot] = 0
        self.head_end_s[slot] = 0.0
        self.unseen.discard(slot)

    def join(self, lease: Lease, now_s: float) -> None:
        """A request goes out now, to the end of its replica's line."""
        slot = lease.slot
        lease.pending = True
        self.settle(slot, now_s)
        line = self.line[slot]
        line.append(lease)
        if len(line) == 1:
            self._begin(slot, now_s)
        else:
            self.pending_tokens[slot] += lease.prefill_tokens

    def ended(self, lease: Lease, now_s: float) -> None:
        """The first octet came back: the prompt has been computed. Harmless when repeated."""
        if lease.released:
            return
        slot, line = lease.slot, self.line[lease.slot]
        self.settle(slot, now_s)
        if not lease.pending:  # or its first octet is its last: it has left when it should have
            return
        alone = lease.streamed and bool(line) and line[0] is lease
        while line and line[0] is not lease and not line[0].streamed:
            self._leave_head(slot)  # it was before this one, so it is computed too
        if line and line[0] is lease:
            self._leave_head(slot)
            if alone:
                lease.head_s = max(0.0, now_s - self._head_start_s[slot])
            self._advance(slot, now_s)
        elif lease in line:  # overtook the head: its work was done in the head's time
            line.remove(lease)
            self.pending_tokens[slot] -= lease.prefill_tokens
            if lease.streamed:
                lease.head_s = 0.0
            self._leave_line(lease)

    def withdraw(self, lease: Lease, now_s: float) -> None:
        """It ended before its first octet: cancelled, failed, or its replica is gone."""
        slot, line = lease.slot, self.line[lease.slot]
        self._leave_line(lease)
        if line and line[0] is lease:
            line.popleft()
            if line:
                self.pending_tokens[slot] -= line[0].prefill_tokens
            self._advance(slot, now_s)
        elif lease in line:
            line.remove(lease)
            self.pending_tokens[slot] -= lease.prefill_tokens

    def settle(self, slot: int, now_s: float) -> None:
        """Let requests that show no first octet leave the line when they should be computed."""
        line = self.line[slot]
        while line and not line[0].streamed and self.head_end_s[slot] <= now_s:
            end_s = self.head_end_s[slot]
            self._leave_head(slot)
            self._advance(slot, end_s)

    def settle_due(self, now_s: float) -> None:
        """Settle every replica where somebody should have left the line by now."""
        if self.unseen:
            for slot in [slot for slot in self.unseen if self.head_end_s[slot] <= now_s]:
                self.settle(slot, now_s)

    def queued_tokens(self, slot: int) -> int:
        """Return the prefill tokens in the line."""
        line = self.line[slot]
        return self.pending_tokens[slot] + (line[0].prefill_tokens if line else 0)

    def _begin(self, slot: int, start_s: float) -> None:
        head = self.line[slot][0]
        overhead_s = self._speeds.overhead_s(slot)
        prefill_s = head.prefill_tokens * self._s_per_token[slot]
        self._head_start_s[slot] = start_s
        self.head_end_s[slot] = max(start_s + overhead_s + prefill_s, _NEVER_ZERO_S)
        if head.streamed:
            self.unseen.discard(slot)
        else:
            self.unseen.add(slot)

    def _leave_head(self, slot: int) -> None:
        """Take the head out. `_advance` makes the next one the head."""
        lease = self.line[slot].popleft()
        self._leave_line(lease)
        if self.line[slot]:
            self.pending_tokens[slot] -= self.line[slot][0].prefill_tokens

    def _leave_line(self, lease: Lease) -> None:
        lease.pending = False
        if lease.queued_tokens and self.headcount is not None:
            self.headcount.left_line(lease)

    def _advance(self, slot: int, now_s: float) -> None:
        if self.line[slot]:
            self._begin(slot, now_s)
        else:
            self.head_end_s[slot] = 0.0
            self.unseen.discard(slot)
