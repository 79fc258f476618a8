"""Which replica keeps which stored answer: only that one can go on from it.

Bounded by the order in which they were stored; of one that is forgotten every replica is asked, as
of one that another proxy stored and nobody told us of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from proxy.core import limits


class Responses:
    """Replica names by the key of the response."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: OrderedDict[int, str] = OrderedDict()

    def stored(self, response_key: int, replica_name: str) -> None:
        self._places[response_key] = replica_name
        self._places.move_to_end(response_key)
        if len(self._places) > limits.RESPONSES_MAX:
            self._places.popitem(last=False)

    def place_of(self, response_key: int) -> str | None:
        return self._places.get(response_key)

    def dump(self) -> Iterator[tuple[int, str]]:
        """Yield what is known, the oldest first."""
        yield from list(self._places.items())
