"""Which replica keeps which answer of the Responses API, for the requests that go on from it.

An engine keeps the answers that it gave in its own memory, and no other knows them. Their ids are
read as they pass, and of each only a hash is kept, with the name of its replica; the ones that were
longest of no use are forgotten. A replica that is forgotten, or was never known, is looked for as
if there were none: each is asked for a stored answer, and a new turn goes by its prompt.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core import limits
from proxy.core.picture import Seats

_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')


def find_id(octets: bytes) -> bytes:
    """Return the id in the beginning of an answer, an object or a stream of events; or nothing.

    A search is enough: within a JSON string every quote is escaped.
    """
    match = _ID.search(octets)
    return match[1] if match is not None else b""


class Stored:
    """The names of replicas by the keys of answers (`core.session.response_key`)."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}  # the one used last is the last

    def __len__(self) -> int:
        return len(self._names)

    def remember(self, key: int, replica_name: str) -> None:
        self._names.pop(key, None)
        self._names[key] = replica_name
        if len(self._names) > limits.RESPONSES_REMEMBERED_MAX:
            del self._names[next(iter(self._names))]

    def place_of(self, key: int, seats: Seats, slots: dict[str, int]) -> int:
        """Return the place of the replica that keeps the answer; -1 when it cannot be asked."""
        name = self._names.pop(key, "")
        if not name:
            return -1
        self._names[key] = name
        return seats.places.get(slots.get(name, -1), -1)
