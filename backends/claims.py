"""What pools want of the machine's cards, what their replicas hold, and what is decided of it.

Values only: `arbiter.py` decides, whoever calls it fills these in from what it sees.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

from backends.gpus import Gpu
from backends.ladder import Rest, Rung, WayUp
from backends.planning.goal import WorkClass

RANKS: Final[dict[WorkClass, int]] = {"online": 0, "semi-online": 1, "offline": 2}


class Transit(enum.StrEnum):
    """Whether a replica is on its way, and to where."""

    NONE = ""
    COMING = "coming"  # to serve; it has its cards
    GOING = "going"  # down; `rung` is where it will be


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that exists, and what taking it away would cost."""

    replica_id: str
    rung: Rung
    transit: Transit = Transit.NONE
    devices: tuple[str, ...] = ()  # cards whose lease it holds
    bound: tuple[str, ...] = ()  # it can only come back on these cards
    in_flight: int = 0
    idle_s: float = 0.0
    up_for_s: float = 0.0  # since it began to serve
    start_s: float = 0.0  # what its coming up took
    heat: int = 0  # tokens of its cache that are likely to be used again
    come_back_s: float = 0.0  # from where it would rest
    rests: tuple[Rest, ...] = ()  # where it could be lowered to, the least deep first
    from_nothing: bool = False  # it comes by a start, which can be broken off
    failing: bool = False  # starts have failed, and this one is the next
    kept: bool = False  # an operator's, or nobody's business: it is not moved

    @property
    def serves(self) -> bool:
        """Whether it serves, or will without anybody doing more for it."""
        return self.transit is Transit.COMING or (
            self.rung is Rung.AWAKE and self.transit is Transit.NONE
        )

    @property
    def settled(self) -> bool:
        """Whether it has been up for as long as its coming up took."""
        return self.up_for_s >= self.start_s

    @property
    def yields(self) -> tuple[float, ...]:
        """Order replicas by who goes first: asleep, idle, cold, cheap to bring back, long idle."""
        busy = self.in_flight > 0
        return self.rung is Rung.AWAKE, busy, self.heat, self.come_back_s, -self.idle_s


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one pool wants, and what it has."""

    pool: str
    model: str = ""
    work_class: WorkClass = "online"
    gpus_each: int = 1  # 0: it needs none of ours
    desired: int = 0
    min: int = 0
    weight: float = 1.0  # of its share where cards are scarce
    holders: tuple[Holder, ...] = ()
    queued: int = 0
    queued_tokens: int = 0
    queued_s: float = 0.0  # the longest wait of a request
    unserved_s: float = 0.0  # how long it has wanted a replica and had none (`arbiter.Unserved`)
    ways_up: tuple[WayUp, ...] = ()  # the best first; a new replica is always among them

    @property
    def wants(self) -> int:
        return max(self.desired, self.min)

    @property
    def serving(self) -> tuple[Holder, ...]:
        """Those that serve or come."""
        return tuple(holder for holder in self.holders if holder.serves)

    def may_yield(self, holder: Holder) -> bool:
        """Whether this replica may be taken down now. One that rests has nothing to lose.

        One that has just come up is given its own start time, or starts would be all it is paid
        for: as long as its pool wants it. Offline work is not: whoever waits for an answer would
        wait for that, too. Nor is a start after others that failed: it would be tried for ever,
        though nobody asks any more.
        """
        offline = self.work_class == "offline"
        if holder.kept or holder.transit is Transit.GOING:
            return False
        if holder.transit is Transit.COMING:
            return holder.from_nothing and (offline or holder.failing)
        settled = holder.rung is not Rung.AWAKE or offline or holder.settled
        return settled or holder.replica_id in self._young_not_wanted

    @property
    def _young_not_wanted(self) -> frozenset[str]:
        """Return those that have just come up and that the pool does not want any more.

        Those still on their way up are no reason to let go of one that is there.
        """
        awake = [h for h in self.serving if h.transit is Transit.NONE and not h.kept]
        young = sorted((h for h in awake if not h.settled), key=lambda h: (h.yields, h.replica_id))
        fixed = sum(holder.kept for holder in self.serving)
        beyond = len(young) + fixed - self.wants  # those that have settled go first
        return frozenset(holder.replica_id for holder in young[: max(0, beyond)])


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The cards of the machine, and what is left of its memory for those that rest."""

    gpus: tuple[Gpu, ...] = ()  # all
    free: frozenset[str] = frozenset()  # devices that no lease holds
    host_bytes_free: int | None = None  # None: not counted


class Raise(msgspec.Struct, frozen=True):
    """Bring a replica up; `replica_id` None: a new one. `devices`: the cards to lease for it."""

    pool: str
    replica_id: str | None
    rung: Rung  # that it comes from
    devices: tuple[str, ...] = ()


class Lower(msgspec.Struct, frozen=True):
    """Take a replica down to `rung`.

    `cut`: its requests are ended at the next token and asked again elsewhere, by whoever sent
    them; otherwise they finish first.
    """

    pool: str
    replica_id: str
    rung: Rung
    reason: str
    cut: bool = False


class Wait(msgspec.Struct, frozen=True):
    """One more is to come, as soon as it can."""

    pool: str
    reason: str


Move = Raise | Lower | Wait


class Refusal(msgspec.Struct, frozen=True):
    """What a pool wants and will not get as things are."""

    pool: str
    missing: int  # replicas
    reason: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done, in this order, and the figures it follows from, by pool."""

    moves: tuple[Move, ...] = ()
    refused: tuple[Refusal, ...] = ()
    terms: Mapping[str, Mapping[str, float]] = {}
