"""Which session a request says it belongs to.

The first that is present wins: an explicit routing key, the session headers that engines and other
routers read, those that agent programs send on their own, then the body's `prompt_cache_key` and
`session_id`. Request, correlation and trace ids never count: they differ for each request, and
affinity to them is no affinity. A session orders the ring; it pins nothing.
"""

from __future__ import annotations

from typing import Final

from proxy.core import limits
from proxy.core.http1 import RequestHead
from proxy.core.scan import Scanned

# Compared without case, hyphens and underscores, as people write them all ways.
_HEADERS_IN_ORDER: Final = (
    b"xdohertyroutingkey",
    b"xsmgroutingkey",
    b"xsessionid",
    b"xsessionaffinity",
    b"xclaudecodesessionid",
    b"sessionid",
    b"xparentsessionid",
    b"xdynamosessionid",
)
_RANK: Final = {name: rank for rank, name in enumerate(_HEADERS_IN_ORDER)}


def session_key(head: RequestHead, scanned: Scanned | None) -> bytes | None:
    """Return the session's key, or None when the request names none. Too long a key is none."""
    best_rank = len(_HEADERS_IN_ORDER)
    best: bytes | None = None
    for name, value in head.fields:
        # Cheap test first: most names hold no such word.
        if b"session" not in name and b"routing" not in name:
            continue
        rank = _RANK.get(name.translate(None, b"-_"), best_rank)
        if rank < best_rank and 0 < len(value) <= limits.SESSION_KEY_BYTES_MAX:
            best_rank, best = rank, value
    if best is not None or scanned is None:
        return best
    for text in (scanned.prompt_cache_key, scanned.session_id):
        if text:
            key = text.encode("utf-8", "surrogatepass")
            if len(key) <= limits.SESSION_KEY_BYTES_MAX:
                return key
    return None
