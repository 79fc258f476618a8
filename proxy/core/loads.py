"""What each replica has to do, and how fast it does it: seconds of work, per slot.

Work is counted in prefill tokens when it is dispatched, since whatever is counted later lets a
burst pile onto one replica before anybody notices. Engines prefill first come, first served, so the
requests of a replica whose first octet is still out stand in line; the first of them is being
computed since the one before it answered, and the part of it that must be done by now is credit.
An answer that is not streamed shows no first octet until its end: such a request leaves the line
when its prefill should be over.

Speed is learned from the same line: tokens computed per second of being at its head, forgotten by
half after some time of work, and compared with the other replicas of the group (one model on one
kind of hardware): within a quarter of their median a replica counts as one of them, so that noise
does not look like a difference; beyond it, it is priced as slow or as fast as it is.

One writer. Lists by slot and not objects, because a decision reads a few figures of every replica.
"""

from __future__ import annotations

from collections import deque
from math import exp
from typing import Final

from proxy.core import limits
from proxy.core.index import Sighting

_NEVER_ZERO_S: Final = 1e-9
_LN_2: Final = 0.6931471805599453


class Lease:
    """The load that one exchange holds on a replica, from dispatch to its one release."""

    __slots__ = (
        "cached_octets", "decoding", "first_noted", "head_s", "lease_id", "pending",
        "prefill_tokens", "prompt_octets", "prompt_tokens", "released", "replica_name",
        "sighting", "slot", "started_s", "streamed", "weight",
    )  # fmt: skip

    def __init__(
        self,
        slot: int,
        replica_name: str,
        *,
        prefill_tokens: int,
        prompt_tokens: int,
        streamed: bool = True,
        weight: float = 1.0,
        lease_id: int = 0,
    ) -> None:
        """`weight` is what a second of waiting counts for this class of work, 1 for a person's."""
        self.slot = slot
        self.replica_name = replica_name
        self.prefill_tokens = max(1, prefill_tokens)
        self.prompt_tokens = prompt_tokens
        self.streamed = streamed
        self.weight = weight
        self.lease_id = lease_id
        self.pending = False
        self.decoding = False
        self.released = False
        self.started_s = 0.0
        self.head_s = -1.0  # how long it was at the head of the line, if that was seen
        # What the index knew when it was dispatched; the answer's counts are judged by it.
        self.prompt_octets = 0
        self.cached_octets = 0
        self.sighting: Sighting | None = None
        self.first_noted = 0  # of its chain's points: those before were in use just now


class Group:
    """Replicas that should be equally fast: what is typical of them."""

    __slots__ = ("learned", "overhead_s", "s_per_token", "slots")

    def __init__(self) -> None:
        self.s_per_token = 1.0 / limits.PREFILL_TOKENS_PER_S_DEFAULT
        self.overhead_s = 0.0  # of a first token, beyond its prefill: network, intake, one step
        self.slots: set[int] = set()
        self.learned = 0  # since the median was last taken


class Loads:
    """Load and speed of all replicas, by slot."""

    def __init__(self) -> None:
        size = 0
        self.inflight: list[int] = [0] * size
        self.inflight_max: list[int] = [0] * size  # 0: no limit
        self.dispatched_tokens: list[int] = [0] * size  # ever: it evens out the use of caches
        self.pending_tokens: list[int] = [0] * size  # behind the head of the line
        self.head_end_s: list[float] = [0.0] * size  # when the head should be done; 0: no head
        self.s_per_token: list[float] = [0.0] * size
        self.price_per_token: list[float] = [0.0] * size  # of a newcomer's own uncached tokens
        self.extra_s: list[float] = [0.0] * size  # waiting for a slot
        self.free_tokens: list[int] = [0] * size  # of KV, by the engine's gauge and what came since
        self.tight: set[int] = set()  # slots where a prompt might not fit
        self.decoding: list[float] = [0.0] * size  # requests past their prefill, by weight
        self.s_per_output_token: list[float] = [0.0] * size  # learned; 0: not yet
        self.held_tokens: list[int] = [0] * size  # KV of requests under way: prompts
        self.capacity_tokens: list[int] = [0] * size
        self.running_max: list[int] = [0] * size  # requests that it computes at a time; 0: any
        self.request_s: list[float] = [0.0] * size  # how long a request holds its slot; learned
        self.line: list[deque[Lease]] = []
        self.unseen: set[int] = set()  # slots whose head shows no first octet
        self._head_start_s: list[float] = [0.0] * size
        self._busy_s: list[float] = [0.0] * size
        self._done_tokens: list[float] = [0.0] * size
        self._own_s_per_token: list[float] = [0.0] * size
        self.gauge_end_s: list[float] = []  # when all that its gauge showed should be done
        self._foreign: list[int] = []  # requests of others, by the engine's gauges
        self._others_held_tokens: list[int] = []  # KV in use by the engine's gauge, less ours then
        self._gauged: list[bool] = []
        self._group: list[Group | None] = []
        self._groups: dict[str, Group] = {}

    # --- slots -------------------------------------------------------------------------------

    def open(
        self,
        slot: int,
        group: str,
        *,
        capacity_tokens: int,
        inflight_max: int = 0,
        running_max: int = 0,
    ) -> None:
        """A replica has taken the slot, idle and as fast as its group."""
        while len(self.inflight) <= slot:
            self._grow()
        self._leave_group(slot)
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = Group()
        found.slots.add(slot)
        self._group[slot] = found
        self.inflight[slot] = self.dispatched_tokens[slot] = self.pending_tokens[slot] = 0
        self.held_tokens[slot] = self._foreign[slot] = self._others_held_tokens[slot] = 0
        self._gauged[slot] = False
        self.head_end_s[slot] = self.extra_s[slot] = self.decoding[slot] = 0.0
        self.gauge_end_s[slot] = 0.0
        self._busy_s[slot] = self._done_tokens[slot] = self._own_s_per_token[slot] = 0.0
        self.s_per_output_token[slot] = self.request_s[slot] = 0.0
        self.line[slot] = deque()
        self.unseen.discard(slot)
        self.s_per_token[slot] = found.s_per_token
        # A newcomer that begins as the least used would get everything until it has caught up.
        used = [self.dispatched_tokens[other] for other in found.slots if other != slot]
        self.dispatched_tokens[slot] = min(used) if used else 0
        self.limit(slot, capacity_tokens, inflight_max, running_max)

    def limit(
        self, slot: int, capacity_tokens: int, inflight_max: int = 0, running_max: int = 0
    ) -> None:
        """What the replica can hold and run, as its manager and its engine say."""
        self.capacity_tokens[slot] = capacity_tokens
        self.inflight_max[slot] = inflight_max
        self.running_max[slot] = running_max
        self._reprice(slot)

    def close(self, slot: int) -> None:
        """The replica is gone. Leases on it may still be released; they change nothing more."""
        self._leave_group(slot)
        self.line[slot] = deque()
        self.unseen.discard(slot)
        self.tight.discard(slot)

    def _leave_group(self, slot: int) -> None:
        group = self._group[slot]
        if group is not None:
            group.slots.discard(slot)
            self._group[slot] = None
            for name in [k for k, g in self._groups.items() if not g.slots]:
                del self._groups[name]

    def _grow(self) -> None:
        for ints in (
            self.inflight, self.inflight_max, self.dispatched_tokens, self.pending_tokens,
            self.held_tokens, self.capacity_tokens, self.running_max, self.free_tokens,
            self._foreign, self._others_held_tokens,
        ):  # fmt: skip
            ints.append(0)
        for floats in (
            self.head_end_s, self.s_per_token, self.price_per_token, self.extra_s, self.decoding,
            self.s_per_output_token, self.request_s, self.gauge_end_s, self._head_start_s,
            self._busy_s, self._done_tokens, self._own_s_per_token,
        ):  # fmt: skip
            floats.append(0.0)
        self.line.append(deque())
        self._group.append(None)
        self._gauged.append(False)

    # --- one request -------------------------------------------------------------------------

    def acquire(self, lease: Lease, now_s: float) -> None:
        """Count a request that goes out now, at the end of its replica's line."""
        slot = lease.slot
        lease.pending = True
        lease.started_s = now_s
        self.settle(slot, now_s)
        line = self.line[slot]
        line.append(lease)
        self.inflight[slot] += 1
        self.dispatched_tokens[slot] += lease.prefill_tokens
        self.held_tokens[slot] += lease.prompt_tokens
        if self._foreign[slot]:
            waiting_s = max(self.gauge_end_s[slot], now_s)
            self.gauge_end_s[slot] = waiting_s + lease.prefill_tokens * self.s_per_token[slot]
        if len(line) == 1:
            self._begin(slot, now_s)
        else:
            self.pending_tokens[slot] += lease.prefill_tokens
        self._recount(slot)

    def prefill_ended(self, lease: Lease, now_s: float) -> None:
        """The first octet came back: the prompt has been computed. Harmless when repeated."""
        if not lease.pending or lease.released:
            return
        slot, line = lease.slot, self.line[lease.slot]
        alone = bool(line) and line[0] is lease
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
            lease.head_s = 0.0
            self._start_decoding(lease)
        self._toll(slot)

    def release(
        self, lease: Lease, now_s: float, output_tokens: int = 0, computed_tokens: int = 0
    ) -> None:
        """`computed_tokens` of the prompt were not cached, as the answer says; 0: it does not."""
        assert not lease.released, "a lease is released exactly once"
        slot = lease.slot
        if lease.head_s >= 0.0 and not self._foreign[slot]:  # else others' work was in that time
            self._learn(slot, computed_tokens or lease.prefill_tokens, lease.head_s)
        if lease.pending:
            self._withdraw(lease, now_s)
        elif lease.decoding:
            self.decoding[slot] = max(0.0, self.decoding[slot] - lease.weight)
        lease.released = True
        lease.decoding = False
        self.inflight[slot] = max(0, self.inflight[slot] - 1)
        self.held_tokens[slot] = max(0, self.held_tokens[slot] - lease.prompt_tokens)
        if output_tokens:
            held_s = now_s - lease.started_s
            before_s = self.request_s[slot]
            self.request_s[slot] = before_s + limits.LEARN_SHARE * (held_s - before_s)
        self._toll(slot)
        self._recount(slot)

    def decoded(self, slot: int, tokens: int, seconds: float) -> None:
        """An answer took so long from its first token to its last."""
        if tokens > 1 and seconds > 0.0:
            sample_s = seconds / (tokens - 1)
            before_s = self.s_per_output_token[slot]
            share = limits.LEARN_SHARE if before_s else 1.0
            self.s_per_output_token[slot] = before_s + share * (sample_s - before_s)

    def settle(self, slot: int, now_s: float) -> None:
        """Let requests that show no first octet leave the line when they should be computed."""
        line = self.line[slot]
        while line and not line[0].streamed and self.head_end_s[slot] <= now_s:
            end_s = self.head_end_s[slot]
            self._leave_head(slot)
            self._advance(slot, end_s)
            self._toll(slot)

    # --- what a newcomer would meet ----------------------------------------------------------

    def wait_s(self, slot: int, now_s: float) -> float:
        """Return the seconds of work before a newcomer's."""
        queued_s = self.pending_tokens[slot] * self.s_per_token[slot]
        end_s = self.head_end_s[slot]
        if end_s > 0.0:  # the longer it is late, the longer it will be
            queued_s += abs(end_s - now_s)
        return max(queued_s, self.gauge_end_s[slot] - now_s)

    def waits_s(self, slots: list[int], now_s: float) -> list[float]:
        """Return `wait_s` of many slots, and what else they would have a newcomer wait for."""
        for slot in [slot for slot in self.unseen if self.head_end_s[slot] <= now_s]:
            self.settle(slot, now_s)
        pending, speed, ends, extra, gauges = (
            self.pending_tokens, self.s_per_token, self.head_end_s, self.extra_s, self.gauge_end_s,
        )  # fmt: skip
        out = []
        for slot in slots:
            wait_s = pending[slot] * speed[slot]
            end_s = ends[slot]
            if end_s > now_s:
                wait_s += end_s - now_s
            elif end_s > 0.0:
                wait_s += now_s - end_s
            end_s = gauges[slot]
            if end_s > now_s and end_s - now_s > wait_s:
                wait_s = end_s - now_s
            out.append(wait_s + extra[slot])
        return out

    def queued_tokens(self, slot: int) -> int:
        """Return the prefill tokens in the line."""
        line = self.line[slot]
        return self.pending_tokens[slot] + (line[0].prefill_tokens if line else 0)

    def foreign_share(self, slots: list[int]) -> float:
        """Return which part of what the engines run is not ours: other routers', other clients'."""
        foreign = sum([self._foreign[slot] for slot in slots])
        ours = sum([self.inflight[slot] for slot in slots])
        return foreign / (foreign + ours) if foreign else 0.0

    def reconcile(
        self, slot: int, *, requests: int, waiting_tokens: int, held_tokens: int, now_s: float
    ) -> None:
        """Take an engine's own gauges: what is more there than we know of is others' work.

        What is less is not: the gauges are older than our last dispatches.
        """
        self.settle(slot, now_s)
        self._foreign[slot] = max(0, requests - self.inflight[slot])
        queued_tokens = sum([lease.prompt_tokens for lease in self.line[slot]])  # hold nothing yet
        self._others_held_tokens[slot] = held_tokens - (self.held_tokens[slot] - queued_tokens)
        self._gauged[slot] = True
        self.gauge_end_s[slot] = 0.0
        if self._foreign[slot]:
            self.gauge_end_s[slot] = now_s + waiting_tokens * self.s_per_token[slot]
        self._reprice(slot)

    # --- the line ----------------------------------------------------------------------------

    def _begin(self, slot: int, start_s: float) -> None:
        head = self.line[slot][0]
        group = self._group[slot]
        overhead_s = group.overhead_s if group is not None else 0.0
        prefill_s = head.prefill_tokens * self.s_per_token[slot]
        self._head_start_s[slot] = start_s
        self.head_end_s[slot] = max(start_s + overhead_s + prefill_s, _NEVER_ZERO_S)
        if head.streamed:
            self.unseen.discard(slot)
        else:
            self.unseen.add(slot)

    def _leave_head(self, slot: int) -> None:
        """Take the head out. `_advance` makes the next one the head."""
        lease = self.line[slot].popleft()
        self._start_decoding(lease)
        if self.line[slot]:
            self.pending_tokens[slot] -= self.line[slot][0].prefill_tokens

    def _start_decoding(self, lease: Lease) -> None:
        lease.pending = False
        lease.decoding = True
        self.decoding[lease.slot] += lease.weight

    def _advance(self, slot: int, now_s: float) -> None:
        if self.line[slot]:
            self._begin(slot, now_s)
        else:
            self.head_end_s[slot] = 0.0
            self.unseen.discard(slot)

    def _withdraw(self, lease: Lease, now_s: float) -> None:
        """It ended before its first octet: cancelled, failed, or its replica is gone."""
        slot, line = lease.slot, self.line[lease.slot]
        lease.pending = False
        if line and line[0] is lease:
            line.popleft()
            if line:
                self.pending_tokens[slot] -= line[0].prefill_tokens
            self._advance(slot, now_s)
        elif lease in line:
            line.remove(lease)
            self.pending_tokens[slot] -= lease.prefill_tokens

    # --- prices and speeds -------------------------------------------------------------------

    def _reprice(self, slot: int) -> None:
        """Renew what depends on the slot's load and speed, so that a decision only reads it."""
        self._toll(slot)
        self.extra_s[slot] = 0.0
        self.tight.discard(slot)
        self._recount(slot)

    def _toll(self, slot: int) -> None:
        """Its speed is another, or who decodes there."""
        toll = 1.0 + limits.RECOMPUTE_WEIGHT + limits.STALL_WEIGHT * self.decoding[slot]
        self.price_per_token[slot] = self.s_per_token[slot] * toll

    def _recount(self, slot: int) -> None:
        """Requests have come or gone: perhaps there is no room for more, where room is known."""
        slots = self.running_max[slot]
        if slots:
            over = self.inflight[slot] + self._foreign[slot] + 1 - slots
            # Slots come free at `slots` in the time that a request holds one.
            self.extra_s[slot] = over * self.request_s[slot] / slots if over > 0 else 0.0
        capacity = self.capacity_tokens[slot]
        if capacity and self._gauged[slot]:  # prefixes in common are held once: only it can tell
            used = self.held_tokens[slot] + self._others_held_tokens[slot]
            self.free_tokens[slot] = int(capacity * limits.KV_FULL_SHARE) - used
            if used > capacity * limits.KV_TIGHT_SHARE:
                self.tight.add(slot)
            else:
                self.tight.discard(slot)

    def shortage_s(self, slot: int, prompt_tokens: int) -> float:
        """Return how long a prompt waits for KV space: all of it comes free in a request's time."""
        short = prompt_tokens - self.free_tokens[slot]
        if slot not in self.tight or short <= 0:
            return 0.0
        return short / self.capacity_tokens[slot] * self.request_s[slot]

    def _learn(self, slot: int, tokens: int, seconds: float) -> None:
        """Take in that the head of the line took so long for so many tokens."""
        group = self._group[slot]
        if group is None:
            return
        if seconds > 0.0 and tokens <= limits.SMALL_PREFILL_TOKENS:
            beyond_s = seconds - tokens * group.s_per_token
            bounded_s = min(max(0.0, beyond_s), limits.FIRST_TOKEN_OVERHEAD_S_MAX)
            group.overhead_s += limits.LEARN_SHARE * (bounded_s - group.overhead_s)
        seconds = max(0.0, seconds - group.overhead_s)
        keep = exp(-_LN_2 * seconds / limits.SPEED_HALF_LIFE_S)
        self._busy_s[slot] = self._busy_s[slot] * keep + seconds
        self._done_tokens[slot] = self._done_tokens[slot] * keep + tokens
        prior_s = limits.SPEED_PRIOR_S
        prior_tokens = prior_s / group.s_per_token
        self._own_s_per_token[slot] = (self._busy_s[slot] + prior_s) / (
            self._done_tokens[slot] + prior_tokens
        )
        group.learned += 1
        if group.learned >= len(group.slots):
            self._take_median(group)
        self._set_speed(slot, group)

    def _take_median(self, group: Group) -> None:
        group.learned = 0
        known = sorted(
            [s for s in [self._own_s_per_token[slot] for slot in group.slots] if s > 0.0]
        )
        if known:
            group.s_per_token = known[len(known) // 2]
        for slot in group.slots:
            self._set_speed(slot, group)

    def _set_speed(self, slot: int, group: Group) -> None:
        own, typical = self._own_s_per_token[slot], group.s_per_token
        usual = typical / limits.SPEED_BAND < own < typical * limits.SPEED_BAND
        speed = typical if usual or own <= 0.0 else own
        if speed != self.s_per_token[slot]:
            self.s_per_token[slot] = speed
            self._reprice(slot)
