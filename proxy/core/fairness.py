"""Who among the tenants is within his share of what is scarce, counted in tokens.

Requests differ a thousandfold in what they cost, so shares of requests would be no shares at all.
Each tenant has a counter of the tokens that were computed for him, divided by his weight: what was
not cached of his prompts, and what was generated. It is charged when a request is dispatched, by
what that should need, and put right when the answer has said what it needed. Whoever has the least
goes first, as in deficit round robin (Shreedhar & Varghese, "Efficient Fair Queuing using Deficit
Round Robin", SIGCOMM 1995) and the virtual token counter (Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024). All within one quantum of the least are equal, so that among them the
earliest deadline decides and then the shortest: no tenant can buy all capacity with tight
deadlines, and none loses for want of one.

What nobody else wanted costs nothing: who begins to wait is lifted to a little below the least of
those who wait, and where nobody waits, the one served last is the measure. So idling earns no more
credit than that little: what all replicas do in `SHARE_CREDIT_S`. By it one who takes less than his
share has his bursts served at once, as if nobody else were there. Without it he would wait as for a
server of his share alone, which is long where he uses most of it.

Each class has counters of its own: a class goes before another whosesoever it is, and within each
the shares hold. Those of other workers are added where there are any (`core.share_cells`).
"""

from __future__ import annotations

from typing import Final

from proxy.core import claim_limits, limits
from proxy.core.classes import NAMES, ONLINE
from proxy.core.share_cells import ShareCells, name_of

_NEVER: Final = float("inf")


class Account:
    """What one tenant was given in one class, and what he has waiting."""

    __slots__ = (
        "charged", "elsewhere", "name", "open", "output_tokens", "row", "seen_s", "tenant",
        "waiting", "waiting_elsewhere", "weight", "work_class",
    )  # fmt: skip

    def __init__(self, work_class: int, tenant: str, weight: float) -> None:
        self.work_class = work_class
        self.tenant = tenant
        self.weight = weight
        self.charged = 0.0  # by this worker: tokens by weight, and what it was lifted by
        self.elsewhere = 0.0  # the same, by other workers, as far as it is known
        self.waiting = 0
        self.waiting_elsewhere = 0
        self.open = 0  # requests dispatched and not over
        self.output_tokens = claim_limits.OUTPUT_TOKENS_DEFAULT  # of an answer; learned
        self.seen_s = -_NEVER  # when one of its requests came last
        self.name = 0  # under which all workers know it; 0: there is only this one
        self.row = -1  # where they count it together; below 0: nowhere

    @property
    def counter(self) -> float:
        return self.charged + self.elsewhere


class Shares:
    """All tenants' accounts in one worker, by class."""

    __slots__ = (
        "_accounts", "_active", "_credit_tokens", "_due", "_floors", "_least",
        "_least_active_elsewhere", "_least_waiting_elsewhere", "_read_s", "_stale_s", "_waiting",
        "cells", "on",
    )  # fmt: skip

    def __init__(self) -> None:
        self.on = False  # there are tenants to tell apart
        self.cells: ShareCells | None = None  # None: this worker is the only one
        self._accounts: dict[tuple[int, str], Account] = {}
        self._active: dict[Account, None] = {}  # those that wait, or came lately
        self._waiting = [0 for _ in NAMES]
        self._floors = [0.0 for _ in NAMES]
        self._least = [0.0 for _ in NAMES]
        self._least_waiting_elsewhere = [_NEVER for _ in NAMES]
        self._least_active_elsewhere = [_NEVER for _ in NAMES]
        self._due = True
        self._credit_tokens = claim_limits.SHARE_QUANTUM_TOKENS
        self._read_s = -_NEVER
        self._stale_s = -_NEVER

    def __len__(self) -> int:
        return len(self._accounts)

    def know_speed(self, tokens_per_s: float) -> None:
        """This is what all replicas together compute: by it a burst is measured."""
        credit = tokens_per_s * claim_limits.SHARE_CREDIT_S
        self._credit_tokens = max(claim_limits.SHARE_QUANTUM_TOKENS, credit)

    @property
    def accounts(self) -> list[Account]:
        return list(self._accounts.values())

    def account(self, work_class: int, tenant: str, weight: float, now_s: float) -> Account:
        """Return the account of a request that has come; it is made where there is none."""
        work_class = max(ONLINE, work_class)
        found = self._accounts.get((work_class, tenant))
        if found is None:
            found = self._open(work_class, tenant, weight, now_s)
        found.weight = weight
        if found not in self._active:
            self._active[found] = None
            self._due = True  # it was not among those by whom the others are judged
        found.seen_s = now_s
        return found

    def _open(self, work_class: int, tenant: str, weight: float, now_s: float) -> Account:
        if len(self._accounts) >= claim_limits.ACCOUNTS_MAX:
            self._forget()
        account = Account(work_class, tenant, weight)
        self._accounts[work_class, tenant] = account
        if self.cells is not None:
            account.name = name_of(work_class, tenant)
            self._find_row(self.cells, account, now_s)
        return account

    def _find_row(self, cells: ShareCells, account: Account, now_s: float) -> None:
        account.row = cells.row(account.name, now_s)
        if account.row >= 0:
            seen = cells.seen(account.row)
            account.charged = seen.own
            account.elsewhere = seen.charged - seen.own
            account.waiting_elsewhere = seen.waiting_elsewhere

    def _forget(self) -> None:
        """Drop those who have nothing here and came longest ago; there are always some."""
        idle = [each for each in self._accounts.values() if not each.waiting and not each.open]
        idle.sort(key=_seen_s)
        for each in idle[: len(idle) // 2 + 1]:
            self._active.pop(each, None)
            del self._accounts[each.work_class, each.tenant]

    # --- what happens to it ------------------------------------------------------------------

    def begins_to_wait(self, account: Account) -> None:
        if not account.waiting + account.waiting_elsewhere:
            self._renew_floor(account.work_class)
            lifted = self._lifted(account)
            if account.counter < lifted:
                self._lift(account, lifted)
        account.waiting += 1
        self._active[account] = None
        self._waiting[account.work_class] += 1
        self._changed(account)

    def _lifted(self, account: Account) -> float:
        """Return what the counter of one that begins to wait is at the least."""
        return self._floors[account.work_class] - self._credit_tokens / account.weight

    def _lift(self, account: Account, counter: float) -> None:
        if self.cells is not None and account.row >= 0:
            account.charged = self.cells.lift(account.row, account.name, counter)
        else:
            account.charged += counter - account.counter

    def waits_no_more(self, account: Account) -> None:
        account.waiting -= 1
        self._waiting[account.work_class] -= 1
        self._changed(account)

    def dispatched(self, account: Account, prompt_tokens: int) -> float:
        """Charge what a request should need; return that, for `over`."""
        tokens = prompt_tokens + account.output_tokens
        account.open += 1
        self._charge(account, tokens)
        return tokens

    def over(self, account: Account, charged_tokens: float, needed_tokens: float) -> None:
        """It has ended, and needed so much: exactly once for each that was dispatched."""
        account.open -= 1
        if needed_tokens != charged_tokens:
            self._charge(account, needed_tokens - charged_tokens)

    def learn(self, account: Account, output_tokens: float) -> None:
        """An answer had so many tokens; the next should have about as many."""
        account.output_tokens += limits.LEARN_SHARE * (output_tokens - account.output_tokens)

    def _charge(self, account: Account, tokens: float) -> None:
        account.charged += tokens / account.weight
        work_class = account.work_class
        elsewhere = self._least_waiting_elsewhere[work_class] < _NEVER
        if not self._waiting[work_class] and not elsewhere:
            self._floors[work_class] = max(self._floors[work_class], account.counter)
        self._changed(account)

    def _changed(self, account: Account) -> None:
        self._due = True
        cells = self.cells
        if cells is None or account.row < 0:
            return
        row, charged, waiting = account.row, account.charged, account.waiting
        if not cells.write(row, account.name, charged, waiting, account.seen_s):
            account.row = -1  # it was idle for long, and is another's now
            account.elsewhere = 0.0

    # --- what it is asked --------------------------------------------------------------------

    def refresh(self, now_s: float) -> None:
        """Look at all of them once, so that `level` only reads. Before each look at who waits."""
        cells = self.cells
        if cells is not None and now_s - self._read_s >= claim_limits.SHARE_READ_S:
            self._read_s = now_s
            self._read(cells, now_s)
        if not (self._due or now_s >= self._stale_s):
            return
        self._due = False
        # Some may not be about any more then, though nothing happens.
        self._stale_s = now_s + claim_limits.SHARE_RECENT_S / 8.0
        recent_s = now_s - claim_limits.SHARE_RECENT_S
        least = list(self._least_active_elsewhere)
        for work_class in range(len(NAMES)):
            self._renew_floor(work_class)
        for account in list(self._active):
            work_class, counter = account.work_class, account.counter
            if not account.waiting:
                if account.seen_s < recent_s:
                    del self._active[account]
                    continue
                # It would be lifted to this if it waited.
                counter = max(counter, self._lifted(account))
            least[work_class] = min(least[work_class], counter)
        self._least = least

    def _read(self, cells: ShareCells, now_s: float) -> None:
        """Take what other workers charged, and who waits or came there."""
        self._due = True
        rows = {account.name: account for account in self._accounts.values()}
        waiting = [_NEVER for _ in NAMES]
        active = [_NEVER for _ in NAMES]
        recent_s = now_s - claim_limits.SHARE_RECENT_S
        for seen in cells.all_seen():
            account, work_class = rows.get(seen.name), seen.work_class
            if account is not None:
                account.elsewhere = seen.charged - seen.own
                account.waiting_elsewhere = seen.waiting_elsewhere
            if seen.waiting_elsewhere:
                waiting[work_class] = min(waiting[work_class], seen.charged)
                active[work_class] = min(active[work_class], seen.charged)
            elif seen.seen_s >= recent_s:
                lifted = self._floors[work_class] - self._credit_tokens
                active[work_class] = min(active[work_class], max(seen.charged, lifted))
        self._least_waiting_elsewhere, self._least_active_elsewhere = waiting, active

    def _renew_floor(self, work_class: int) -> None:
        """The least of those who wait: it only rises."""
        least = self._least_waiting_elsewhere[work_class]
        if self._waiting[work_class]:
            for account in self._active:
                if account.waiting and account.work_class == work_class:
                    least = min(least, account.counter)
        if least < _NEVER:
            self._floors[work_class] = max(self._floors[work_class], least)

    def part_of(self, account: Account) -> float:
        """Return which part of what its class is given is this one's, of those who wait here."""
        weights = [
            each.weight
            for each in self._active
            if each.work_class == account.work_class and (each.waiting or each is account)
        ]
        return account.weight / sum(weights)

    def level(self, account: Account) -> int:
        """Return by how many quanta it is over the least of those who are about; 0: within.

        As `refresh` saw them last: others' charges since then can only have lowered it.
        """
        above = account.counter - self._least[account.work_class]
        return int(above / claim_limits.SHARE_QUANTUM_TOKENS) if above > 0.0 else 0

    def runway_s(self, account: Account | None) -> float:
        """Return how little a replica must have to do to be open to requests of this one.

        Less for one who was given more than another that is about, by however little: what it has
        sent is in the way of whoever comes next, and cannot be called back.
        """
        if account is None:
            return limits.RUNWAY_S
        ahead = account.counter - self._least[account.work_class]
        over = ahead > claim_limits.SHARE_QUANTUM_TOKENS / 16.0
        return claim_limits.RUNWAY_OVER_S if over else limits.RUNWAY_S


def _seen_s(account: Account) -> float:
    return account.seen_s
