"""How many lines of jobs may be on the replicas that serve others first, at this moment.

Lines are to have what nobody needs, and nobody is to notice. Nobody can say beforehand how much
that is, so the gate finds out, as TCP finds out what a path carries (Jacobson, Congestion Avoidance
and Control, 1988): it lets few lines in, twice as many while nothing shows that they are felt, one
more a replica once it knows where that began, and half as many when it shows. It looks at

* the decode steps. A step with more sequences takes longer, and everybody's next token with it.
  Step times are learned by powers of two of the batch, and a batch is as large as may be without
  being more than `SLOWER_MAX` slower than one of the others alone;
* the prompts. A step that computes a prompt holds up every stream of its replica, whatever the
  batch. Where others' prompts are in more than one step of a hundred, those are the slow steps that
  people feel, and lines' prompts may be in others, one after the other, for `PREFILL_SHARE` of the
  time. Where they are rarer, lines must be rarer still: several begin in one step, and then none in
  the next hundred or more, so that of a hundred steps one is slow at most;
* the KV cache, before an engine has to throw anybody out of it;
* queues: requests that wait in an engine beside ours, lines that a proxy turned back or ended.

And nothing goes in, and everything comes out, when it is plain that others need it all: a burst
(more arrivals than chance brings, Poisson's with `SURE` deviations), a pool that scales by one,
requests that still wait at the second look. What came out is done later, elsewhere or here: a cut
line costs what was computed of it, a person's wait is never made good.

Where there is nobody else there is nobody to be spared: then only caches, queues and limits count.
And where nobody has come for `ALONE_S` it opens within a second or two: it begins at `ALONE_LINES`
a replica and doubles at each look. To wait for readings would spare nobody, and a job of some
hundred lines would be done before the gate is open. The proxies still turn back what an engine
could not begin at once, so no queue forms for who comes next.

A pool grows by `target_inputs` and `kv_target`: lines stay below both, together with the others, so
that nothing is started for them.

Pure: a gate is told what is seen and answers; it has no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from backends.offline.steps import PrefillSpeed, StepTimes
from proxy.contract import LoadSample

NEWS_AGE_S_MAX = 5.0  # without news for longer nothing new goes in
SLOWER_MAX = 0.15  # of the mean step; busier moments have slower ones by themselves
PREFILL_SHARE = 0.03  # of a replica's time, for the prompts of lines, beside others
SLOW_SHARE = 0.01  # of steps: the hundredth, which is p99
SLOW_SHARE_MOST = 0.008  # of steps that compute a prompt, where others' are fewer than that
SLOW_SHARE_LEAST = 0.003  # of steps that compute lines' prompts, however many others' there are
SLOW_STEPS = 2.0  # times as long as a step is: prompts that begin in one
STEP_S_GUESS = 0.01
OTHERS_S = 10.0  # over which those who are in flight are averaged: chance is no trend
KV_FULL = 0.9  # of the cache held by requests: as much as lines may bring it to
KV_TARGET_SHARE = 0.95  # of what a pool aims at, so that it does not grow for lines
KV_NEAR = 0.9  # of that bound: no more lines than there are
KV_SPILLS = 0.97  # of the cache: the next token may throw somebody out
INPUTS_SHARE = 0.8  # of `max_inputs`: the rest is for who comes next
QUEUED_MAX = 2  # requests that wait in one engine between two steps without its being a queue
BURST_S = 2.0  # over which arrivals are counted
BASE_S = 30.0  # before that, with which they are compared
SURE = 4.0  # deviations of chance
BURST_MIN = 4.0  # and so many requests beyond them: two do not make a burst
BURST_HOLD_S = 5.0  # nothing goes in for so long after one
PRESSED_HOLD_S = 1.0  # the same after a line was ended for somebody's sake
USED_SHARE = 0.7  # of the limit that must be in use before it grows
ALONE_S = BASE_S  # without anybody else, after which it opens fast
ALONE_LINES = 8.0  # a replica, to begin with
CUT_OVER = 1.5  # times the room, beyond which lines come out: fewer come out by ending


class ReplicaSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One replica that takes requests."""

    replica_id: str
    load: LoadSample | None = None
    target_inputs: int = 0  # requests in flight above which its pool grows; 0: none
    max_inputs: int = 0  # requests in flight that it may never exceed; 0: any number


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the replicas of one model, and of those who use them."""

    at_s: float
    news_age_s: float = 0.0
    replicas: tuple[ReplicaSeen, ...] = ()  # those that take requests
    others_in_flight: int = 0
    others_queued: int = 0
    others_arrivals_total: int = 0
    panicking: bool = False  # the pool scales by a burst
    kv_target: float = 1.0
    lines: int = 0  # in flight
    turned_back: int = 0  # lines that found no room, since the last look
    preempted: int = 0  # lines that were ended for somebody's sake, since then


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What may be: new lines up to `lines` in flight, and of those that are, `keep`."""

    lines: int
    keep: int
    prompt_tokens_per_s: float = math.inf  # of lines that begin
    prompt_tokens_at_once: float = 0.0  # that are saved up for one step; 0: none, one by one
    reason: str = ""  # one of few, for people and for counting


class Gate:
    """The gate of the replicas of one model, and what it has learnt of them."""

    def __init__(self, lines_each_max: int) -> None:
        """`lines_each_max` is what one replica gets at most."""
        self.lines_each_max = lines_each_max
        self._limit = 0.0
        self._turn = math.inf  # the limit above which it grows slowly
        self._held_until_s = -math.inf
        self._held_for = ""
        self._others_waited = False
        self._others_s = math.inf  # when others were last seen
        self._alone = False  # and that is long ago
        self._heard_s = -math.inf  # of the newest reading when it last grew
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=256)
        self._others: deque[tuple[float, int]] = deque(maxlen=256)
        self._preemptions: dict[str, int] = {}
        self._steps = StepTimes()
        self._speed = PrefillSpeed()

    def decide(self, seen: Seen) -> Verdict:
        """Say what may be until the next look."""
        thrown_out = self._learn(seen)
        self._others_waited, waited = seen.others_queued > 0, self._others_waited
        if stop := self._stop(seen, waited=waited):
            self._limit, self._turn = 0.0, max(1.0, min(self._turn, seen.lines / 2))
            return Verdict(lines=0, keep=0, reason=stop)
        if seen.news_age_s > NEWS_AGE_S_MAX:
            return Verdict(lines=0, keep=seen.lines, reason="no news")
        pressed = self._pressed(seen, thrown_out=thrown_out)
        if pressed:
            self._limit = self._turn = max(1.0, min(self._limit, float(seen.lines)) / 2)
        if seen.preempted:
            self._hold(seen.at_s + PRESSED_HOLD_S, pressed)
        room, why = self._room(seen)
        if not pressed:
            self._grow(seen, room)
        keep = self._keep(seen, room)
        if seen.at_s < self._held_until_s:
            return Verdict(lines=0, keep=keep, reason=self._held_for)
        lines = min(room, int(self._limit))
        tokens_per_s, at_once = self._pace(seen)
        return Verdict(
            lines=lines,
            keep=keep,
            prompt_tokens_per_s=tokens_per_s,
            prompt_tokens_at_once=at_once,
            reason=pressed or (why if lines == room else "open"),
        )

    # --- what is seen ---------------------------------------------------------------------------

    def _learn(self, seen: Seen) -> bool:
        """Take what the readings tell; say whether an engine has thrown somebody out since."""
        self._note_arrivals(seen)
        present = {replica.replica_id for replica in seen.replicas}
        self._steps.keep(present)
        self._preemptions = {n: c for n, c in self._preemptions.items() if n in present}
        thrown_out = False
        for replica, load in _read(seen.replicas):
            self._steps.note(replica.replica_id, load)
            self._speed.note(load)
            before = self._preemptions.get(replica.replica_id, load.preemptions_total)
            thrown_out |= load.preemptions_total > before
            self._preemptions[replica.replica_id] = load.preemptions_total
        return thrown_out

    def _note_arrivals(self, seen: Seen) -> None:
        arrivals = self._arrivals
        news = not arrivals or arrivals[-1][1] != seen.others_arrivals_total
        if news or seen.others_in_flight or seen.others_queued:
            self._others_s = seen.at_s
        alone = seen.at_s - self._others_s >= ALONE_S
        if alone and not self._alone:
            self._turn = math.inf  # what was felt, others felt
        self._alone = alone
        if arrivals and seen.others_arrivals_total < arrivals[-1][1]:
            arrivals.clear()  # another manager counts
        arrivals.append((seen.at_s, seen.others_arrivals_total))
        while arrivals[0][0] < seen.at_s - BURST_S - BASE_S:
            arrivals.popleft()
        self._others.append((seen.at_s, seen.others_in_flight))
        while self._others[0][0] <= seen.at_s - OTHERS_S:
            self._others.popleft()

    def _others_each(self, seen: Seen) -> int:
        """Return the requests of others on each replica, in the mean of some time."""
        mean = sum(count for _, count in self._others) / len(self._others)
        return math.ceil(mean / len(seen.replicas))

    # --- what follows ---------------------------------------------------------------------------

    def _stop(self, seen: Seen, *, waited: bool) -> str:
        """Return why nothing may be there; empty: something may."""
        if not seen.replicas:
            return "nothing awake"
        if seen.panicking or is_burst(self._arrivals):
            self._hold(seen.at_s + BURST_HOLD_S, "burst")
            return "burst"
        if waited and seen.others_queued:
            self._hold(seen.at_s + PRESSED_HOLD_S, "others wait")
            return "others wait"
        return ""

    def _pressed(self, seen: Seen, *, thrown_out: bool) -> str:
        """Return what shows that lines are felt; empty: nothing does."""
        if seen.preempted:
            return "preempted"
        if seen.others_queued:
            return "others wait"
        if _kv_used(seen) >= _kv_bound(seen):
            return "kv cache"
        if thrown_out:
            return "thrown out"
        if seen.others_in_flight and seen.lines:
            queued = max((load.waiting for _, load in _read(seen.replicas)), default=0)
            if queued > QUEUED_MAX:
                return "engine queue"
        return ""

    def _room(self, seen: Seen) -> tuple[int, str]:
        """Return how many lines have a place, and what bounds them."""
        mean_each = self._others_each(seen)
        now_each = math.ceil(seen.others_in_flight / len(seen.replicas))
        beside = math.inf
        if mean_each:
            beside = self._steps.batch_max(mean_each, SLOWER_MAX) - mean_each
        room, why = 0, "full"
        for replica in seen.replicas:
            free = min(inputs_max(replica) - now_each, self.lines_each_max)
            if beside < free:
                free, why = beside, "slower steps"
            room += int(max(0, free))
        return room, why

    def _grow(self, seen: Seen, room: int) -> None:
        """Let in more, if all that may be in is, and readings have come or nobody else has."""
        if seen.turned_back:  # it is as full as proxies let it be
            self._limit = max(1.0, min(self._limit, float(seen.lines)))
            return
        heard_s = min((load.at_s for _, load in _read(seen.replicas)), default=-math.inf)
        fast = self._alone and self._limit < self._turn
        if self._limit and heard_s <= self._heard_s and not fast:
            return
        self._heard_s = heard_s
        count = len(seen.replicas)
        least = 0.0 if self._limit else float(count)
        if fast:
            least = max(least, min(count * ALONE_LINES, self._turn))
        if self._limit < least:
            self._limit = least
        elif seen.lines >= USED_SHARE * self._limit and not _kv_near(seen):
            doubled = min(2 * self._limit, max(self._turn, self._limit))
            self._limit = max(doubled, self._limit + count)
        self._limit = min(self._limit, float(max(room, 1)))

    def _keep(self, seen: Seen, room: int) -> int:
        """Return how many of the lines that are there may stay."""
        if seen.others_in_flight and _kv_used(seen) >= max(_kv_bound(seen), KV_SPILLS):
            return seen.lines // 2
        return room if seen.lines > CUT_OVER * room + len(seen.replicas) else seen.lines

    def _pace(self, seen: Seen) -> tuple[float, float]:
        """Return the prompt tokens that may begin in a second, and those at once."""
        others_each = self._others_each(seen)
        if not others_each and not seen.others_queued:
            return math.inf, 0.0
        (first_s, first), (last_s, last) = self._arrivals[0], self._arrivals[-1]
        rate = (last - first) / max(last_s - first_s, BURST_S) / len(seen.replicas)
        step_s = self._steps.step_s(others_each) or STEP_S_GUESS
        tokens_per_s = self._speed.tokens_per_s * len(seen.replicas)
        theirs = rate * step_s
        if theirs >= SLOW_SHARE:
            return PREFILL_SHARE * tokens_per_s, 0.0
        ours = max(SLOW_SHARE_LEAST, SLOW_SHARE_MOST - theirs)
        at_once = SLOW_STEPS * step_s * tokens_per_s
        return at_once * ours / step_s, at_once

    def _hold(self, until_s: float, why: str) -> None:
        if until_s > self._held_until_s:
            self._held_until_s, self._held_for = until_s, why


def inputs_max(replica: ReplicaSeen) -> float:
    """Return how many requests a replica may have with lines among them."""
    bounds = [math.inf]
    if replica.target_inputs:
        bounds.append(replica.target_inputs)
    elif replica.max_inputs:
        bounds.append(INPUTS_SHARE * replica.max_inputs)
    if replica.load is not None and replica.load.running_max:
        bounds.append(replica.load.running_max)
    return min(bounds)


def is_burst(arrivals: Sequence[tuple[float, int]]) -> bool:
    """Say whether more came in the last `BURST_S` than chance explains. (time, total so far)."""
    now_s, total = arrivals[-1]
    first_s, first = arrivals[0]
    before = [count for at_s, count in arrivals if at_s <= now_s - BURST_S]
    base_s = now_s - BURST_S - first_s
    if not before or base_s < BURST_S:
        return False  # it is not known what is usual
    expected = (before[-1] - first) / base_s * BURST_S
    return total - before[-1] > expected + SURE * math.sqrt(expected) + BURST_MIN


def _read(replicas: Iterable[ReplicaSeen]) -> list[tuple[ReplicaSeen, LoadSample]]:
    return [(replica, replica.load) for replica in replicas if replica.load is not None]


def _kv_used(seen: Seen) -> float:
    return max((load.kv_used_ratio for _, load in _read(seen.replicas)), default=0.0)


def _kv_bound(seen: Seen) -> float:
    return min(KV_FULL, KV_TARGET_SHARE * seen.kv_target)


def _kv_near(seen: Seen) -> bool:
    return _kv_used(seen) >= KV_NEAR * _kv_bound(seen)
