"""The load that one exchange holds on a replica, and what was believed when it was taken."""

from __future__ import annotations

from proxy.core.fairness import Account
from proxy.core.index import Sighting


class Lease:
    """The load that one exchange holds on a replica, from dispatch to its one release."""

    __slots__ = (
        "account", "cached_octets", "cell", "charged_tokens", "first_noted", "head_s",
        "lease_id", "life", "pending", "prefill_tokens", "prompt_octets", "prompt_tokens",
        "queued_tokens", "released", "replica_name", "sighting", "slot", "spare", "started_s",
        "streamed", "weight", "yields",
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
        self.life = 0  # of its slot
        self.spare = False  # it may have only what is spare, and is no demand
        self.yields = False  # it may be ended for online work before it is answered
        self.account: Account | None = None  # of its tenant, until it is settled; None: of none
        self.charged_tokens = 0.0  # there
        self.pending = False
        self.released = False
        self.started_s = 0.0
        self.cell = -1  # where it is counted for all workers (`core.headcount`); -1: nowhere
        self.queued_tokens = 0  # counted there while it is in line
        self.head_s = -1.0  # how long it was at the head of the line, if that was seen
        # What the index knew when it was dispatched; the answer's counts are judged by it.
        self.prompt_octets = 0
        self.cached_octets = 0
        self.sighting: Sighting | None = None
        self.first_noted = 0  # of its chain's points: those before were in use just now
