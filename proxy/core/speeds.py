"""How fast each replica computes prompts, learned from the line of its prefills.

Tokens computed per second of being at the head of that line, forgotten by half after some time of
work, and compared with the other replicas of the group (one model on one kind of hardware): within
a quarter of their median a replica counts as one of them, so that noise does not look like a
difference; beyond it, it is priced as slow or as fast as it is.
"""

from __future__ import annotations

from math import exp
from typing import Final

from proxy.core import limits

_LN_2: Final = 0.6931471805599453


class Group:
    """Replicas that should be equally fast: what is typical of them."""

    __slots__ = ("learned", "overhead_s", "s_per_token", "slots")

    def __init__(self) -> None:
        self.s_per_token = 1.0 / limits.PREFILL_TOKENS_PER_S_DEFAULT
        self.overhead_s = 0.0  # of a first token, beyond its prefill: network, intake, one step
        self.slots: set[int] = set()
        self.learned = 0  # since the median was last taken


class Speeds:
    """Seconds a token, by slot, and by whose example."""

    def __init__(self) -> None:
        self.s_per_token: list[float] = []
        self._busy_s: list[float] = []
        self._done_tokens: list[float] = []
        self._own_s_per_token: list[float] = []  # 0: not yet known
        self._group: list[Group | None] = []
        self._groups: dict[str, Group] = {}

    def open(self, slot: int, name: str) -> None:
        """A replica of this group has taken the slot, as fast as the others."""
        while len(self.s_per_token) <= slot:
            for floats in (
                self.s_per_token, self._busy_s, self._done_tokens, self._own_s_per_token,
            ):  # fmt: skip
                floats.append(0.0)
            self._group.append(None)
        self.close(slot)
        found = self._groups.get(name)
        if found is None:
            found = self._groups[name] = Group()
        found.slots.add(slot)
        self._group[slot] = found
        self._busy_s[slot] = self._done_tokens[slot] = self._own_s_per_token[slot] = 0.0
        self.s_per_token[slot] = found.s_per_token

    def close(self, slot: int) -> None:
        group = self._group[slot]
        if group is not None:
            group.slots.discard(slot)
            self._group[slot] = None
            for name in [k for k, g in self._groups.items() if not g.slots]:
                del self._groups[name]

    def fellows(self, slot: int) -> list[int]:
        """Return the other slots of the group."""
        group = self._group[slot]
        return [each for each in group.slots if each != slot] if group is not None else []

    def overhead_s(self, slot: int) -> float:
        """Return what a first token takes beyond its prefill."""
        group = self._group[slot]
        return group.overhead_s if group is not None else 0.0

    def learn(self, slot: int, tokens: int, seconds: float) -> list[int]:
        """Take in that the head of the line took so long for so many tokens.

        Returns the slots whose speed is another now.
        """
        group = self._group[slot]
        if group is None:
            return []
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
            return self._take_median(group)
        return [slot] if self._set(slot, group) else []

    def _take_median(self, group: Group) -> list[int]:
        group.learned = 0
        known = sorted(
            [s for s in [self._own_s_per_token[slot] for slot in group.slots] if s > 0.0]
        )
        if known:
            group.s_per_token = known[len(known) // 2]
        return [slot for slot in group.slots if self._set(slot, group)]

    def _set(self, slot: int, group: Group) -> bool:
        own, typical = self._own_s_per_token[slot], group.s_per_token
        usual = typical / limits.SPEED_BAND < own < typical * limits.SPEED_BAND
        speed = typical if usual or own <= 0.0 else own
        changed = speed != self.s_per_token[slot]
        self.s_per_token[slot] = speed
        return changed
