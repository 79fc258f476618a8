"""What each replica has to do: seconds of work, per slot.

Work is counted in prefill tokens when it is dispatched, since whatever is counted later lets a
burst pile onto one replica before anybody notices. It stands in line until it is computed
(`core.prefilling`), and holds a place and KV memory until its answer has ended. What an engine's
own gauges show beyond that is the work of others.

One writer. Lists by slot and not objects, because a decision reads a few figures of every replica.
"""

from __future__ import annotations

from proxy.core import limits
from proxy.core.classes import ONLINE
from proxy.core.headcount import Headcount
from proxy.core.lease import Lease
from proxy.core.pacing import Pacing
from proxy.core.prefilling import Prefilling
from proxy.core.spare import Spare
from proxy.core.speeds import Speeds


class Loads:
    """Load and speed of all replicas, by slot."""

    def __init__(self) -> None:
        self.inflight: list[int] = []
        self.inflight_max: list[int] = []  # 0: no limit
        self.lower_max: list[int] = []  # the same for all but online work; 0: no limit
        self.online_reserve = 0.0  # part of what a replica may have that only online work takes
        self.tokens_max: list[int] = []  # in its line, of more than one request; 0: no limit
        self.measured: set[int] = set()  # slots that have such a limit
        self.headcount: Headcount | None = None  # None: nobody else of this proxy chooses
        self.crowded: set[int] = set()  # slots that others have filled, as `headcount` just said
        self.full: set[int] = set()  # slots that have as many requests as they may have
        self.lower_full: set[int] = set()  # and those that have so for all but online work
        self.dispatched_tokens: list[int] = []  # ever: it evens out the use of caches
        self.speeds = Speeds()
        self.s_per_token = self.speeds.s_per_token
        self.prefilling = Prefilling(self.speeds)
        self.pending_tokens = self.prefilling.pending_tokens
        self.head_end_s = self.prefilling.head_end_s
        self.price_per_token: list[float] = []  # of a newcomer's own uncached tokens, for itself
        self.stall_per_token: list[float] = []  # and for those who are there; not of all of them
        self.extra_s: list[float] = []  # waiting for a slot
        self.free_tokens: list[int] = []  # of KV, by the engine's gauge and what came since
        self.tight: set[int] = set()  # slots where a prompt might not fit
        self.present: list[float] = []  # requests under way, by weight
        self.pacing = Pacing()
        self.s_per_output_token = self.pacing.s_per_token  # learned; 0: not yet
        self.held_tokens: list[int] = []  # KV of requests under way: prompts
        self.capacity_tokens: list[int] = []
        self.running_max: list[int] = []  # requests that it computes at a time; 0: any
        self.request_s: list[float] = []  # how long a request holds its slot; learned
        self.spare = Spare()
        self.gauge_end_s: list[float] = []  # when all that its gauge showed should be done
        self._foreign: list[int] = []  # requests of others, by the engine's gauges
        self._others_held_tokens: list[int] = []  # KV in use by the engine's gauge, less ours then
        self._gauged: list[bool] = []
        self._peak: list[int] = []  # most that were in flight since the last gauge
        self._refused: list[int] = []  # answers in a row that sent us away
        self._refused_end_s: list[float] = []

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
        self.speeds.open(slot, group)
        self.prefilling.clear(slot)
        self.inflight[slot] = self.dispatched_tokens[slot] = 0
        self.held_tokens[slot] = self._foreign[slot] = self._others_held_tokens[slot] = 0
        self._gauged[slot] = False
        self._peak[slot] = self._refused[slot] = 0
        self.extra_s[slot] = self.present[slot] = 0.0
        self.gauge_end_s[slot] = self.request_s[slot] = self._refused_end_s[slot] = 0.0
        self.pacing.open(slot)
        self.spare.open(slot)
        # A newcomer that begins as the least used would get everything until it has caught up.
        used = [self.dispatched_tokens[other] for other in self.speeds.fellows(slot)]
        self.dispatched_tokens[slot] = min(used) if used else 0
        self.limit(slot, capacity_tokens, inflight_max, running_max)

    def limit(
        self,
        slot: int,
        capacity_tokens: int,
        inflight_max: int = 0,
        running_max: int = 0,
        tokens_max: int = 0,
    ) -> None:
        """What the replica can hold and run, as its manager and its engine say."""
        self.capacity_tokens[slot] = capacity_tokens
        self.inflight_max[slot] = inflight_max
        self.running_max[slot] = running_max
        self.tokens_max[slot] = tokens_max
        self._reserve(slot)
        if tokens_max:
            self.measured.add(slot)
        else:
            self.measured.discard(slot)
        self._reprice(slot)

    def count_with(self, headcount: Headcount) -> None:
        """Others of this proxy choose too: what each replica has is counted for all of them."""
        self.headcount = self.prefilling.headcount = headcount

    def reserve_online(self, share: float) -> None:
        """Keep this part of each replica for online work from now on."""
        self.online_reserve = share
        for slot in range(len(self.inflight)):
            self._reserve(slot)

    def _reserve(self, slot: int) -> None:
        most = self.inflight_max[slot]
        if self.online_reserve and (most or self.running_max[slot]):
            kept = int((most or self.running_max[slot]) * (1.0 - self.online_reserve))
            most = max(1, kept)  # less would be a replica that serves online work alone
        self.lower_max[slot] = most
        self.full.discard(slot)
        self.lower_full.discard(slot)
        if most:
            self._fill(slot)

    def close(self, slot: int) -> None:
        """The replica is gone. Leases on it may still be released; they change nothing more."""
        self.speeds.close(slot)
        self.prefilling.clear(slot)
        self.tight.discard(slot)
        self.measured.discard(slot)
        self.crowded.discard(slot)
        self.full.discard(slot)
        self.lower_full.discard(slot)

    def _grow(self) -> None:
        for ints in (
            self.inflight, self.inflight_max, self.lower_max, self.tokens_max,
            self.dispatched_tokens, self.held_tokens, self.capacity_tokens, self.running_max,
            self.free_tokens, self._foreign, self._others_held_tokens, self._peak, self._refused,
        ):  # fmt: skip
            ints.append(0)
        for floats in (
            self.price_per_token, self.stall_per_token, self.extra_s, self.present,
            self.request_s, self.gauge_end_s, self._refused_end_s,
        ):  # fmt: skip
            floats.append(0.0)
        self._gauged.append(False)

    # --- one request -------------------------------------------------------------------------

    def acquire(self, lease: Lease, now_s: float) -> None:
        """Count a request that goes out now, at the end of its replica's line."""
        slot = lease.slot
        lease.started_s = now_s
        prefill_s = lease.prefill_tokens * self.s_per_token[slot]
        self.spare.dispatched(slot, prefill_s, now_s, urgent=lease.weight >= 1.0)
        self.prefilling.join(lease, now_s)
        self.inflight[slot] += 1
        self.present[slot] += lease.weight
        self._peak[slot] = max(self._peak[slot], self.inflight[slot])
        self.dispatched_tokens[slot] += lease.prefill_tokens
        self.held_tokens[slot] += lease.prompt_tokens
        if self._foreign[slot]:
            waiting_s = max(self.gauge_end_s[slot], now_s)
            self.gauge_end_s[slot] = waiting_s + prefill_s
        self._toll(slot)
        self._recount(slot)

    def release(
        self, lease: Lease, now_s: float, computed_tokens: int = 0, *, served: bool = True
    ) -> None:
        """`computed_tokens` of the prompt were not cached, as the answer says; 0: it does not.

        What was not `served` teaches nothing: an error comes fast, and computes nothing.
        """
        assert not lease.released, "a lease is released exactly once"
        slot = lease.slot
        if served and lease.head_s >= 0.0 and not self._foreign[slot]:  # else it is others' time
            tokens = computed_tokens or lease.prefill_tokens
            for each in self.speeds.learn(slot, tokens, lease.head_s):
                self._toll(each)
        if lease.pending:
            self.prefilling.withdraw(lease, now_s)
        lease.released = True
        self.inflight[slot] = max(0, self.inflight[slot] - 1)
        self.present[slot] = max(0.0, self.present[slot] - lease.weight)
        self.held_tokens[slot] = max(0, self.held_tokens[slot] - lease.prompt_tokens)
        if served:
            self._refused[slot] = 0
            held_s = now_s - lease.started_s
            before_s = self.request_s[slot]
            share = limits.LEARN_SHARE if before_s else 1.0
            self.request_s[slot] = before_s + share * (held_s - before_s)
        self._toll(slot)
        self._recount(slot)

    def refused(self, slot: int, now_s: float) -> None:
        """It sent somebody away, or failed: nobody has less to do, and nobody should get less.

        Those that follow go elsewhere for a while, the longer the more often it happens.
        """
        self._refused[slot] = min(self._refused[slot] + 1, limits.REFUSALS_COUNTED_MAX)
        pause_s = limits.REFUSED_PAUSE_S * 2.0 ** (self._refused[slot] - 1)
        self._refused_end_s[slot] = now_s + pause_s
        self.gauge_end_s[slot] = max(self.gauge_end_s[slot], now_s + pause_s)

    def decoded(self, slot: int, tokens: int, seconds: float) -> None:
        """An answer took so long from its first token to its last."""
        if tokens > 1 and seconds > 0.0:
            self.pacing.learn(slot, self.streams(slot), seconds / (tokens - 1))

    def streams(self, slot: int) -> int:
        """Return how many requests decode there, whatever each of them weighs."""
        return self.inflight[slot] - len(self.prefilling.line[slot])

    def decoding(self, slot: int) -> float:
        """Return the requests past their prefill, by weight."""
        line = self.prefilling.line[slot]
        return self.present[slot] - sum([lease.weight for lease in line])

    def late_s(self, slot: int, tpot_s: float) -> float:
        """Return by how much an answer would be later than it should, at so long a token."""
        return self.pacing.late_s(slot, self.streams(slot) + 1, tpot_s) if tpot_s else 0.0

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
        self.prefilling.settle_due(now_s)
        pending, speed, ends = self.pending_tokens, self.s_per_token, self.head_end_s
        extra, gauges = self.extra_s, self.gauge_end_s
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

    def is_full(self, slot: int, work_class: int = ONLINE) -> bool:
        """Whether it has as many requests as it may have for one of this class to come."""
        return slot in (self.full if work_class <= ONLINE else self.lower_full) or (
            slot in self.crowded
        )

    def reserve(self, slot: int, name: str, tokens: int, work_class: int = ONLINE) -> bool:
        """Take the place of a request that is dispatched in this turn.

        False: others have taken the last, of which nothing has been heard yet; then the replica
        is full until `crowded` is cleared.
        """
        most = self.lower_max[slot] if work_class > ONLINE and self.online_reserve else 0
        if self.headcount is None or self.headcount.take(name, tokens, most):
            return True
        self.crowded.add(slot)
        return False

    def lacks_room(self, slot: int, tokens: int) -> bool:
        """Whether so many tokens more would be more than its line may have.

        One request may be larger than the limit, and goes where the line is empty.
        """
        most = self.tokens_max[slot]
        queued_tokens = self.prefilling.queued_tokens(slot) if most else 0
        return queued_tokens > 0 and queued_tokens + tokens > most

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
        self.prefilling.settle(slot, now_s)
        self._foreign[slot] = max(0, requests - self._peak[slot])
        self._peak[slot] = self.inflight[slot]
        line = self.prefilling.line[slot]
        queued_tokens = sum([lease.prompt_tokens for lease in line])  # hold nothing yet
        self._others_held_tokens[slot] = held_tokens - (self.held_tokens[slot] - queued_tokens)
        self._gauged[slot] = True
        self.gauge_end_s[slot] = self._refused_end_s[slot]
        if self._foreign[slot]:
            end_s = now_s + waiting_tokens * self.s_per_token[slot]
            self.gauge_end_s[slot] = max(end_s, self._refused_end_s[slot])
        self._reprice(slot)

    def forget_gauges(self, slot: int) -> None:
        """They are too old to tell anything."""
        self._foreign[slot] = self._others_held_tokens[slot] = 0
        self._gauged[slot] = False
        self.gauge_end_s[slot] = self._refused_end_s[slot]
        self._reprice(slot)

    # --- prices and speeds -------------------------------------------------------------------

    def _reprice(self, slot: int) -> None:
        """Renew what depends on the slot's load and speed, so that a decision only reads it."""
        self._toll(slot)
        self.extra_s[slot] = 0.0
        self.tight.discard(slot)
        self._recount(slot)

    def _toll(self, slot: int) -> None:
        """Its speed is another, or who is there, or how long answers are."""
        speed = self.s_per_token[slot]
        self.price_per_token[slot] = speed * (1.0 + limits.RECOMPUTE_WEIGHT)
        self.stall_per_token[slot] = speed * self.pacing.stall(slot, self.present[slot])

    def _recount(self, slot: int) -> None:
        """Requests have come or gone: perhaps there is no room for more, where room is known."""
        if self.lower_max[slot]:
            self._fill(slot)
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

    def _fill(self, slot: int) -> None:
        """Keep apart who may have no more, so that a decision need not look at everybody.

        Who has a limit has one for lower classes, too.
        """
        lower, most, inflight = self.lower_max[slot], self.inflight_max[slot], self.inflight[slot]
        if inflight >= lower:
            self.lower_full.add(slot)
        else:
            self.lower_full.discard(slot)
        if most and inflight >= most:
            self.full.add(slot)
        else:
            self.full.discard(slot)

    def shortage_s(self, slot: int, prompt_tokens: int) -> float:
        """Return how long a prompt waits for KV space: all of it comes free in a request's time."""
        short = prompt_tokens - self.free_tokens[slot]
        if short <= 0 or not self._gauged[slot] or not self.inflight[slot] + self._foreign[slot]:
            return 0.0
        return short / self.capacity_tokens[slot] * self.request_s[slot]
