"""What a placement costs, in seconds: the terms, and their sum.

    price = wait for the work that is there (others' prefill, less what must be done by now)
          + this request's uncached tokens x (1 + recompute) / prefill speed
          + what its prefill costs those who are there (stall)
          + wait for a slot or for KV space, load of an adapter
          + by how much its answer would be late, at a token each so long (`core.pacing`)
          + round trip, for a place in another region, and what that must be cheaper by

Its own uncached tokens count more than once. Once for its own wait; again (*recompute*) for those
who come after it and for what its blocks displace; and again for those who are there (*stall*).

An engine computes the next token of every stream and a chunk of whatever prompt waits in one step,
so a prompt holds up all who are there: those who decode, and those who wait before it, since they
will have begun to by then. A second of prefill makes each token of an answer later by the answer's
part of it. Two things lessen that. A prompt counts as no longer than one chunk: the longest ones
would else do all the waiting, to spare others pauses of which they are a few in a hundred. And it
counts the less, the more there is before it: prompts one after the other, and then a rest in which
all of their answers are read out, hold up fewer of them than the same prompts with gaps between,
into each of which answers begin that the next prompt then holds up.

A request that wants its tokens by a time each is drawn to where it would have them, and kept from
nowhere: too slow a replica is better than none, and than one with an hour of work before it.
"""

from __future__ import annotations

from typing import Final

from proxy.core import claim_limits, limits
from proxy.core.loads import Loads
from proxy.core.outlook import Outlook

_ROUNDED_S_MAX: Final = 1e9  # their microseconds are exact in a float


class Terms:
    """The price of one replica for one request, term by term. Seconds, unless tokens."""

    __slots__ = (
        "adapter_s", "cached_tokens", "extra_s", "pace_s", "prefill_s", "price_s",
        "recompute_s", "round_trip_s", "shortage_s", "stall_s", "uncached_tokens", "wait_s",
    )  # fmt: skip

    def __init__(
        self,
        loads: Loads,
        slot: int,
        now_s: float,
        *,
        cached_tokens: int,
        uncached_tokens: int,
        adapter_s: float = 0.0,
        tpot_s: float = 0.0,
        outlook: Outlook | None = None,
    ) -> None:
        """`outlook` is that of the slot's remote, where it is one: its replicas have its loads."""
        abroad = outlook is not None
        speed = loads.s_per_token[slot] if outlook is None else outlook.s_per_token
        self.cached_tokens = cached_tokens
        self.uncached_tokens = uncached_tokens
        self.wait_s = loads.wait_s(slot, now_s) if outlook is None else outlook.wait_s(now_s)
        self.prefill_s = uncached_tokens * speed
        self.recompute_s = self.prefill_s * limits.RECOMPUTE_WEIGHT
        self.extra_s = loads.extra_s[slot] if outlook is None else outlook.start_s(now_s)
        self.stall_s = 0.0
        if not abroad:
            self.stall_s = stall_s(loads, slot, uncached_tokens, self.wait_s + self.extra_s)
        tokens = cached_tokens + uncached_tokens
        self.shortage_s = 0.0 if abroad else loads.shortage_s(slot, tokens)
        self.round_trip_s = (
            0.0 if outlook is None else outlook.round_trip_s + claim_limits.REGION_SLACK_S
        )
        self.adapter_s = adapter_s
        self.pace_s = 0.0 if abroad else loads.late_s(slot, tpot_s)
        self.price_s = (
            self.wait_s + self.prefill_s + self.recompute_s + self.stall_s + self.extra_s
            + self.shortage_s + adapter_s + self.pace_s + self.round_trip_s
        )  # fmt: skip

    def as_dict(self) -> dict[str, float]:
        """Return the terms under their names, rounded to what they are worth."""
        return {
            "price_s": _rounded(self.price_s),
            "wait_s": _rounded(self.wait_s),
            "prefill_s": _rounded(self.prefill_s),
            "recompute_s": _rounded(self.recompute_s),
            "stall_s": _rounded(self.stall_s),
            "extra_s": _rounded(self.extra_s),
            "shortage_s": _rounded(self.shortage_s),
            "adapter_s": _rounded(self.adapter_s),
            "pace_s": _rounded(self.pace_s),
            "round_trip_s": _rounded(self.round_trip_s),
            "cached_tokens": self.cached_tokens,
            "uncached_tokens": self.uncached_tokens,
        }


def stall_s(loads: Loads, slot: int, uncached_tokens: int, wait_s: float) -> float:
    """Return what the prefill of so many tokens costs those who are there, after such a wait."""
    stalled_s = min(uncached_tokens, limits.STALL_TOKENS_MAX) * loads.stall_per_token[slot]
    return stalled_s * limits.STALL_LINE_S / (limits.STALL_LINE_S + wait_s)


def _rounded(seconds: float) -> float:
    """Return whole microseconds: a tenth of the work of `round`, which makes decimals of them."""
    if 0.0 <= seconds < _ROUNDED_S_MAX:
        return int(seconds * 1e6 + 0.5) / 1e6
    return round(seconds, 6)
