"""Which session a request says it belongs to.

The first that is present wins: an explicit routing key, the session headers that engines and other
routers read, those that agent programs and their routers send on their own, then the body's
`prompt_cache_key`, `session_id` and `session_params.id`. Request, correlation and trace ids never
count: they differ for each request, and affinity to them is no affinity. A session orders the ring;
it pins nothing, unless the operator says so.
"""

from __future__ import annotations

from itertools import product
from typing import Final

from xxhash import xxh3_64_intdigest

from proxy.core import limits
from proxy.core.http1 import RequestHead
from proxy.core.scan import SESSION_PARAMS, Scanned, session_params_id

_IN_ORDER: Final = (
    b"x-doherty-routing-key",
    b"x-session-id",
    b"x-session-affinity",
    b"x-claude-code-session-id",
    b"session-id",
    b"x-parent-session-id",
    b"x-dynamo-session-id",
    b"x-smg-routing-key",
)


def _spellings(name: bytes) -> list[bytes]:
    """People join the words by a hyphen, an underscore, or nothing; fields come in lower case."""
    words = name.split(b"-")
    return [
        b"".join(part for pair in zip(words, (*joints, b""), strict=True) for part in pair)
        for joints in product((b"-", b"_", b""), repeat=len(words) - 1)
    ]


_RANK: Final = {
    spelling: rank for rank, name in enumerate(_IN_ORDER) for spelling in _spellings(name)
}


def session_of_head(head: RequestHead) -> bytes | None:
    """Return the key that the head's fields give, or None. Too long a key is none."""
    best_rank = len(_IN_ORDER)
    best: bytes | None = None
    for name, value in head.fields:
        if name in _RANK:
            rank = _RANK[name]
            if rank < best_rank and 0 < len(value) <= limits.SESSION_KEY_BYTES_MAX:
                best_rank, best = rank, value
    return best


def session_of_body(scanned: Scanned) -> bytes | None:
    """Return the key that the body gives, or None. It counts where the head gives none."""
    key = _key(scanned.prompt_cache_key) or _key(scanned.session_id)
    if key is None and scanned.has(SESSION_PARAMS):
        key = _key(session_params_id(scanned))
    return key


def _key(text: str | None) -> bytes | None:
    """Return what may be a key: not nothing, and not too long."""
    if not text:
        return None
    key = text.encode("utf-8", "surrogatepass")
    return key if len(key) <= limits.SESSION_KEY_BYTES_MAX else None


def response_key(response_id: bytes) -> int:
    """Return what a stored response is known by, which is never 0; or 0 for no id."""
    return xxh3_64_intdigest(response_id) or 1 if response_id else 0
