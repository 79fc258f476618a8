"""Which replica keeps which stored answer: only that one can go on from it.

Bounded by the order in which they were stored; of one that is forgotten every replica is asked, as
of one that another proxy stored and nobody told us of.
"""

from __future__ import annotations

from collections.abc import Iterator

from proxy.core import limits


class Responses:
    """Replica names by the key of the response."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[int, str] = {}

    def stored(self, response_key: int, replica_name: str) -> None:
        self._places.pop(response_key, None)
        self._places[response_key] = replica_name
        if len(self._places) > limits.RESPONSES_MAX:
            del self._places[next(iter(self._places))]

    def place_of(self, response_key: int) -> str | None:
        return self._places.get(response_key)

    def dump(self) -> Iterator[tuple[int, str]]:
        """Yield what is known, the oldest first."""
        yield from list(self._places.items())
