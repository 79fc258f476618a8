"""How many engine workers the jobs of a model need now, and of which pools: values in, values out.

Jobs want tokens for money, not for time: a second worker does the same tokens for the same price in
half the time, so nobody asks for it but a deadline. Hence:

1. **As few as meet every deadline.** Lines are done in the order of their deadlines (Liu and
   Layland, JACM 20 (1), 1973: if any order meets them, that one does), so all are met if, up to
   each, there is no more work than can be done by then. Of the time left `DEADLINE_SHARE` is
   planned with: rates scatter, and lengths of answers are not known before.
2. **At least one while there is work** that is not due before it would be up, unless spare capacity
   does it in time by itself: that is paid for already. Of its rate, which others' traffic may take
   at any moment, half is believed. Where it has shown none yet, what can wait is left to it for a
   moment first, or a worker would come and go again.
3. **The cheapest first**, by what a worker would cost for all that is left, its own start
   included: so a start has to pay, and what is there already goes before what is not. Pools that
   have no price come last where others have one; where none has, a GPU-hour is the price.
4. **What is up stays** while it computes, or there are `LINES_EACH` lines for it, and it is not
   dearer a token than those that are needed: it costs no more than any other, and what it has begun
   would be lost. No new one comes for fewer lines.
5. **No more an hour than the budget**; within it the first worker of each model, then the others by
   deadline.

**A class up** (`presses`): work whose deadlines need most of what all workers could do in the time
left cannot wait any longer behind what is not urgent either, so their pools' claim counts as
semi-online until there is slack again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from backends.offline.work import JobNeed

DEADLINE_SHARE: Final = 0.8
SPARE_BELIEVED: Final = 0.5
SPARE_BELIEVED_LESS: Final = 0.25  # before workers that are up are let go for it
# An engine computes some 256 lines at once; with less than half of that each, one more worker makes
# the others slower a token rather than the job quicker.
LINES_EACH: Final = 128
START_MARGIN: Final = 1.1  # a new worker is taken to cost so much more: prices and rates scatter
# For so long work is left to spare capacity that has shown no rate: a line of a thousand tokens
# takes ten seconds and more, and is told of when it is done.
SPARE_PATIENCE_S: Final = 30.0
PRESSES: Final = 0.7
PRESSES_NO_MORE: Final = 0.5


class Hand(NamedTuple):
    """An engine worker that is up, or will be."""

    ready_in_s: float = 0.0
    busy: bool = False  # it has lines


class Crew(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of engine workers. `price_per_hour`: of one worker; None: nobody has said."""

    pool: str
    rate: float  # tokens a second of one worker
    measured: bool = True
    start_s: float = 0.0
    price_per_hour: float | None = None
    gpus: int = 1
    min: int = 0
    most: int = 1  # by its configuration and the cards that there are
    there: tuple[Hand, ...] = ()
    failing: bool = False  # its starts fail: others are tried first


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs of one model, and who could do them."""

    needs: tuple[JobNeed, ...]  # the earliest due first
    crews: tuple[Crew, ...]
    spare_rate: float | None = None  # tokens a second; 0.0: not measured; None: there is none
    waited_s: float = 0.0  # since there was no work
    pressed: bool = False  # by the last look

    @property
    def tokens(self) -> int:
        return sum(need.tokens for need in self.needs)

    @property
    def lines(self) -> int:
        return sum(need.lines for need in self.needs)


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers a pool should have, and why."""

    workers: int
    reason: str
    presses: bool = False
    terms: dict[str, float] = {}


class _Candidate(NamedTuple):
    crew: Crew
    ready_in_s: float
    new: bool
    busy: bool = False


def pressure(needs: Sequence[JobNeed], capacity: Iterable[tuple[float, float]]) -> float:
    """Return how much of what can be done by its deadline the tightest work is; over 1: too late.

    `capacity`: tokens a second, and seconds until they begin, of each who could work.
    """
    able, tightest, tokens = list(capacity), 0.0, 0
    for need in needs:
        tokens += need.tokens
        can = sum(rate * max(0.0, need.due_in_s - in_s) for rate, in_s in able)
        if tokens:
            tightest = max(tightest, tokens / can if can > 0 else math.inf)
    return tightest


def presses(tightest: float, pressed: bool) -> bool:
    """Say whether work moves up a class; it moves down again only with slack to spare."""
    return tightest >= (PRESSES_NO_MORE if pressed else PRESSES)


def size_all(
    works: Mapping[str, Work], budget_per_hour: float | None = None
) -> dict[str, dict[str, Size]]:
    """Return the size of each pool, by model."""
    order = sorted(works, key=lambda model: (_first_due_s(works[model]), model))
    firsts = {model: _first_price(works[model]) for model in order}
    left = math.inf if budget_per_hour is None else budget_per_hour
    sizes = {}
    for place, model in enumerate(order):
        kept = sum(firsts[later] for later in order[place + 1 :])
        mine = max(left - kept, min(left, firsts[model]))
        sizes[model], spent = _Sizing(works[model], mine).sizes()
        left -= spent
    return sizes


def size(work: Work, budget_per_hour: float | None = None) -> dict[str, Size]:
    """Return the size of each pool of one model."""
    return size_all({"": work}, budget_per_hour)[""]


class _Sizing:
    """One model at one moment."""

    def __init__(self, work: Work, budget_per_hour: float) -> None:
        self.work = work
        self.budget = budget_per_hour
        self.chosen: list[_Candidate] = []
        self.tight = False  # the budget is why there are not more
        self._needs = [
            msgspec.structs.replace(need, due_in_s=need.due_in_s * DEADLINE_SHARE)
            for need in work.needs
        ]
        self._priced = any(crew.price_per_hour is not None for crew in work.crews)
        spare = (work.spare_rate or 0.0) * SPARE_BELIEVED
        done = itertools.accumulate(need.tokens for need in self._needs)
        # Tokens too many by the time that each is due.
        self._late = [
            tokens - spare * need.due_in_s for tokens, need in zip(done, self._needs, strict=True)
        ]
        self._spent = 0.0

    def sizes(self) -> tuple[dict[str, Size], float]:
        """Return the size of each pool, and what all of them cost an hour."""
        work = self.work
        candidates = sorted(self._candidates(), key=self._order)
        self._take_least(candidates)
        why = "there is no work"
        if work.lines:
            why = self._choose(candidates)
            self._keep_busy(candidates)
        tightest = pressure(work.needs, self._capacity(candidates))
        urgent = bool(work.lines and self.chosen) and presses(tightest, work.pressed)
        if urgent:
            why += "; its deadline presses, so it goes before offline work"
        if self.tight:
            why += "; the budget allows no more"
        sizes = {crew.pool: self._size(crew, why, urgent, tightest) for crew in work.crews}
        return sizes, self._spent

    # --- who could work -------------------------------------------------------------------------

    def _candidates(self) -> list[_Candidate]:
        found = []
        for crew in self.work.crews:
            found += [_Candidate(crew, h.ready_in_s, new=False, busy=h.busy) for h in crew.there]
            more = max(crew.most, crew.min) - len(crew.there)
            found += [_Candidate(crew, crew.start_s, new=True) for _ in range(more)]
        return found

    def _order(self, each: _Candidate) -> tuple[bool, bool, float, float, bool, bool, str]:
        crew = each.crew
        unpriced = self._priced and crew.price_per_hour is None
        all_s = each.ready_in_s + self.work.tokens / crew.rate
        cost = self._price(crew) * all_s * (START_MARGIN if each.new else 1.0)
        return crew.failing, unpriced, cost, all_s, each.new, not each.busy, crew.pool

    def _price(self, crew: Crew) -> float:
        if not self._priced:
            return float(max(1, crew.gpus))
        return crew.price_per_hour or 0.0

    # --- who is to work -------------------------------------------------------------------------

    def _take_least(self, candidates: list[_Candidate]) -> None:
        """Take as many of each pool as it always has."""
        for crew in self.work.crews:
            mine = [each for each in candidates if each.crew.pool == crew.pool]
            for each in mine[: crew.min]:
                self._add(each)

    def _add(self, each: _Candidate) -> None:
        self.chosen.append(each)
        self._spent += each.crew.price_per_hour or 0.0
        for place, need in enumerate(self._needs):
            self._late[place] -= each.crew.rate * max(0.0, need.due_in_s - each.ready_in_s)

    def _choose(self, candidates: list[_Candidate]) -> str:
        """Take those that are needed; return why so many."""
        if self._left_to_spare():
            return "spare capacity does it in time"
        if self._too_early():
            return "spare capacity may do it, and has not shown yet how fast"
        in_time = (each for each in _beyond(candidates, self.chosen) if self._comes_in_time(each))
        for each in in_time:
            if self.chosen and (self._in_time() or not self._helps(each)):
                continue
            if not self._affordable(each):
                self.tight = True
                continue
            self._add(each)
        return self._why()

    def _left_to_spare(self) -> bool:
        believed = SPARE_BELIEVED_LESS if self._up else SPARE_BELIEVED
        rate = (self.work.spare_rate or 0.0) * believed
        return rate > 0 and pressure(self._needs, [(rate, 0.0)]) <= 1.0

    def _too_early(self) -> bool:
        """Say whether spare capacity has yet to show what it does, and there is time for that."""
        work = self.work
        unknown = work.spare_rate == 0 and not self._up and work.waited_s < SPARE_PATIENCE_S
        first = min(self._candidates(), key=self._order, default=None) if unknown else None
        if first is None:
            return False
        later_s = first.ready_in_s + SPARE_PATIENCE_S - work.waited_s
        return pressure(self._needs, [(first.crew.rate, later_s)]) <= 1.0

    @property
    def _up(self) -> bool:
        return any(crew.there for crew in self.work.crews)

    def _in_time(self) -> bool:
        return all(tokens <= 0 for tokens in self._late)

    def _affordable(self, each: _Candidate) -> bool:
        return self._spent + (each.crew.price_per_hour or 0.0) <= self.budget

    def _comes_in_time(self, each: _Candidate) -> bool:
        """Say whether anything will be left to do when it is up."""
        return any(need.due_in_s > each.ready_in_s for need in self.work.needs if need.lines)

    def _helps(self, each: _Candidate) -> bool:
        """Say whether one more would be up before what is late is due, and have lines to do."""
        if self.work.lines < LINES_EACH * len(self.chosen):
            return False
        return any(
            tokens > 0 and need.due_in_s > each.ready_in_s
            for tokens, need in zip(self._late, self._needs, strict=True)
        )

    def _keep_busy(self, candidates: list[_Candidate]) -> None:
        """Keep what is up beyond what is needed, as long as that is no waste."""
        if not self.chosen:
            return
        dearest = max(self._per_token(each.crew) for each in self.chosen) * START_MARGIN
        for each in _beyond(candidates, self.chosen):
            busy = each.busy or self.work.lines >= LINES_EACH * (len(self.chosen) + 1)
            cheap = self._per_token(each.crew) <= dearest and self._affordable(each)
            if not each.new and busy and cheap:
                self._add(each)

    def _per_token(self, crew: Crew) -> float:
        return self._price(crew) / crew.rate

    def _capacity(self, workers: Iterable[_Candidate]) -> list[tuple[float, float]]:
        spare = [((self.work.spare_rate or 0.0) * SPARE_BELIEVED, 0.0)]
        return [*spare, *((each.crew.rate, each.ready_in_s) for each in workers)]

    # --- why ------------------------------------------------------------------------------------

    def _why(self) -> str:
        work, workers = self.work, len(self.chosen)
        if not workers:
            return self._why_none()
        done_s = self._done_s()
        text = f"{work.lines} lines ({work.tokens} tokens) are left, "
        text += f"{workers} {'has' if workers == 1 else 'have'} them done in {_words(done_s)}, "
        text += f"the first are due in {_words(_first_due_s(work))}"
        text += "" if self._in_time() else ": too late by these rates"
        known = all(each.crew.measured for each in self.chosen)
        return text if known else text + " (no worker has shown its rate yet)"

    def _why_none(self) -> str:
        if self.tight:
            return "there is work, and a worker would cost too much"
        if any(max(crew.most, crew.min) for crew in self.work.crews):
            return "what is left is due before a worker would be up"
        return "there is work, and no GPU for a worker beside what others are promised"

    def _done_s(self) -> float:
        """Return when all would be done by those who are chosen: rates, from when each is up."""
        left, rate, now_s = float(self.work.tokens), 0.0, 0.0
        able = sorted(self._capacity(self.chosen), key=lambda pair: pair[1])
        for more, in_s in able:
            if rate and left <= rate * (in_s - now_s):
                break
            left -= rate * (in_s - now_s)
            rate, now_s = rate + more, in_s
        return now_s + left / rate if rate else math.inf

    def _size(self, crew: Crew, why: str, urgent: bool, tightest: float) -> Size:
        work = self.work
        workers = sum(each.crew.pool == crew.pool for each in self.chosen)
        terms = {
            "lines": float(work.lines),
            "tokens": float(work.tokens),
            "due_in_s": _first_due_s(work) if work.lines else 0.0,
            "pressure": min(tightest, 1e9),
            "spare_tokens_per_s": work.spare_rate or 0.0,
            "tokens_per_s": crew.rate,
            "rate_measured": float(crew.measured),
            "start_s": crew.start_s,
            "most": float(crew.most),
        }
        if crew.price_per_hour is not None:
            terms["price_per_million_tokens"] = crew.price_per_hour / 3600 / crew.rate * 1e6
        return Size(workers=workers, reason=why, presses=urgent, terms=terms)


def _beyond(candidates: Iterable[_Candidate], chosen: Iterable[_Candidate]) -> list[_Candidate]:
    """Return the candidates without those that are chosen."""
    taken = {id(each) for each in chosen}
    return [each for each in candidates if id(each) not in taken]


def _first_due_s(work: Work) -> float:
    return min((need.due_in_s for need in work.needs if need.lines), default=math.inf)


def _first_price(work: Work) -> float:
    """Return what the first worker of a model costs an hour, where there is work for it."""
    prices = [crew.price_per_hour for crew in work.crews if crew.price_per_hour is not None]
    return min(prices, default=0.0) if work.lines else 0.0


def _words(span_s: float) -> str:
    if math.isinf(span_s):
        return "no time that can be told"
    if span_s < 120:
        return f"{span_s:.0f} s"
    return f"{span_s / 60:.0f} min" if span_s < 7200 else f"{span_s / 3600:.1f} h"
