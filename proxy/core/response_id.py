"""The id under which an engine keeps an answer of the Responses API, read as the answer passes.

What goes on from it names this id, and only the replica that made the answer knows it.
"""

from __future__ import annotations

import re
from typing import Final

_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')


def find_id(octets: bytes) -> bytes:
    """Return the id in the beginning of an answer, an object or a stream of events; or nothing.

    A search is enough: within a JSON string every quote is escaped.
    """
    match = _ID.search(octets)
    return match[1] if match is not None else b""
