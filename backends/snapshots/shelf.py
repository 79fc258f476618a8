"""What the keepers of one manager share about images: which are bad, and whether one is being made.

One dump at a time: it takes the disk and the host's memory whole, and replicas of one pool would
make the same image twice. Who finds the place taken serves without one. An image that failed once
is not tried again: it would fail the next start, too.
"""

from __future__ import annotations

BAD_MAX = 256


class Shelf:
    """Bounded: the oldest verdict goes first."""

    def __init__(self) -> None:
        self.making = False
        self._bad: dict[str, None] = {}

    def discard(self, snapshot_id: str) -> None:
        """Never use this image again."""
        self._bad[snapshot_id] = None
        while len(self._bad) > BAD_MAX:
            del self._bad[next(iter(self._bad))]

    def usable(self, snapshot_id: str) -> bool:
        return snapshot_id not in self._bad
