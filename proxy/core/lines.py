"""Those who wait for one replica, each tenant's for themselves, and who of them is first.

Among a tenant's own the order is that of their ranks (`core.held`). Among tenants it is the class
first, then how far each is over his share (`core.fairness`), then the rank again. What each has
been given changes with every request that goes; so who is first is found among the tenants' firsts
when it is asked for, and nothing has to be sorted anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from proxy.core.classes import OFFLINE
from proxy.core.fairness import Account, Shares
from proxy.core.held import Held, band, class_of, yields

Entry = tuple[float, int, Held]
Place = tuple[int, int, float, int]  # class, quanta over the share, rank, order of arrival


class Order:
    """By what the first among tenants is found at one moment."""

    __slots__ = ("_shares", "now_s")

    def __init__(self, shares: Shares, now_s: float) -> None:
        self._shares = shares
        self.now_s = now_s

    def place(self, held: Held) -> Place:
        account = held.account
        if account is None:
            return (0, 0, held.rank_s, held.order)
        return (band(held, self.now_s), self._shares.level(account), held.rank_s, held.order)


class Line:
    """Those who wait for one replica, and the tokens that they bring there."""

    __slots__ = ("_of", "count", "next_at", "offline_tokens", "tokens")

    def __init__(self) -> None:
        self._of: dict[Account | None, list[Entry]] = {}
        self.count = 0
        self.tokens = 0
        self.offline_tokens = 0  # of them, of offline work
        self.next_at = 0  # where the next look goes on while the line is closed

    def enter(self, held: Held) -> None:
        entries = self._of.get(held.account)
        if entries is None:
            entries = self._of[held.account] = []
        insort(entries, (held.rank_s, held.order, held))
        self.count += 1

    def leave(self, held: Held) -> None:
        entries = self._of[held.account]
        del entries[bisect_left(entries, (held.rank_s, held.order, held))]
        if not entries:
            del self._of[held.account]
        self.count -= 1

    def bring(self, held: Held, tokens: int) -> None:
        """One in this line has so many to be computed there now."""
        more = tokens - held.tokens
        held.tokens = tokens
        self.tokens += more
        if class_of(held) == OFFLINE:
            self.offline_tokens += more

    def tokens_for(self, held: Held) -> int:
        """Return those that stand before one who comes: offline work gives way to all other."""
        return self.tokens if class_of(held) == OFFLINE else self.tokens - self.offline_tokens

    def gives_way(self, held: Held, order: Order) -> bool:
        """Whether all in this line let one go first who does not stand in it."""
        return class_of(held) != OFFLINE and yields(self.first(order), order.now_s)

    def first(self, order: Order) -> Held:
        """Return who is first; there is somebody."""
        best: Held | None = None
        if len(self._of) == 1:
            for entries in self._of.values():
                best = entries[0][2]
        else:
            least: Place = (0, 0, 0.0, 0)
            for entries in self._of.values():
                place = order.place(entries[0][2])
                if best is None or place < least:
                    best, least = entries[0][2], place
        assert best is not None
        return best

    def all(self) -> list[Held]:
        return [entry[2] for entries in self._of.values() for entry in entries]

    def part(self, order: Order, at: int, most: int) -> tuple[int, list[Held]]:
        """Return those from one place on, and the tokens of all before them.

        The first tenant's come first, then the next one's.
        """
        before_tokens = 0
        out: list[Held] = []
        for entries in self._in_order(order):
            before_tokens += sum([entry[2].tokens for entry in entries[:at]])
            out += [entry[2] for entry in entries[at : at + most - len(out)]]
            if len(out) >= most:
                break
            at = max(0, at - len(entries))
        return before_tokens, out

    def _in_order(self, order: Order) -> list[list[Entry]]:
        lists = list(self._of.values())
        if len(lists) > 1:
            lists.sort(key=lambda entries: order.place(entries[0][2]))
        return lists

    def firsts(self, order: Order, most: int) -> list[Held]:
        """Return so many at the most, the tenants in turn."""
        lists = self._in_order(order)
        if len(lists) == 1:
            return [entry[2] for entry in lists[0][:most]]
        out: list[Held] = []
        for depth in range(most):
            out += [entries[depth][2] for entries in lists if depth < len(entries)]
            if len(out) >= min(most, self.count):
                break
        return out[:most]
