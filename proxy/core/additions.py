"""What is added to a body before it goes to a replica, and nothing else of it is touched.

A body is forwarded as the octets that came. A field of ours goes before its last brace: of two keys
of one name the last counts, for engines read bodies with Python's `json.loads` (vLLM, SGLang: by
way of Starlette's `Request.json`) or hold to the same rule, and `core.scan` has found that this is
a JSON object with at least a model in it. So a client's own value is overruled, wherever it stands.

*Cache salt.* Engines find cached prefixes by content alone, so the time to the first token would
tell anybody whether somebody else has sent these words. A salt that goes into the hash of a
prompt's first block sets a tenant's blocks apart: vLLM's `cache_salt` (1 to 1024 characters),
and SGLang's, which puts it in front of a client's own `extra_key`. All salts are of one length, so
no two tenants can come to the same joined key. A client's own salt sets apart once more, within
its tenant. What knows no salt ignores it: both engines accept fields that they do not know.

*Priority.* Engines read one from the body as well, by which a client could go before others. What a
tenant may is said by its class, in a field of the head that outweighs the body's; where an engine
is not known to read that field, a body that names a priority, or might by way of escapes, goes on
with one of 0, which is nobody's advantage and the default of both engines.

*Tier.* vLLM refuses tiers that OpenAI has named since (`fast`), so they go on as what they mean.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Final

from proxy.core.scan import Scanned

_ESCAPED_ASCII: Final = b"\\u00"
_SEARCHED_WHOLE_BYTES: Final = 2048
_SPACE: Final = b" \t\r\n"
_NEW_TIERS: Final = ("fast", "ultrafast")
_NOT_CACHED: Final = ("tokenize", "count_tokens")  # routes by name: nothing is computed


def with_fields(body: bytes, fields: bytes) -> bytes:
    """Return a JSON object that has members with these members, if any, after them."""
    if not fields:
        return body
    end = len(body) - 1
    while body[end] in _SPACE:
        end -= 1
    return b"".join((memoryview(body)[:end], b",", fields, b"}"))  # bodies may be large: one copy


def names_priority(body: bytes, scanned: Scanned | None = None) -> bool:
    """Whether a body may name a priority: its key is there, or escapes that may hide it.

    Its longest part is a value, so no name of the body's own is in it, and it is not searched.
    """
    if scanned is not None and scanned.octets is body and len(body) > _SEARCHED_WHOLE_BYTES:
        start, end = scanned.longest()
        body = body[:start] + body[end:]
    return b'"priority"' in body or _ESCAPED_ASCII in body


def fields_for(
    route_name: str,
    salt: str,
    own_salt: str | None,
    tier: str | None,
    *,
    levels: bool = False,
) -> bytes:
    """Return the members to add to a body; empty for none. `salt` is its tenant's, or empty.

    `levels`: a priority that the body names may count for nothing.
    """
    fields = []
    if salt and route_name not in _NOT_CACHED:
        joined = (
            hmac.digest(salt.encode(), own_salt.encode("utf-8", "surrogatepass"), "sha256").hex()
            if own_salt
            else salt
        )
        fields.append(b'"cache_salt":"%b"' % joined.encode())
    if tier in _NEW_TIERS:
        fields.append(b'"service_tier":"priority"')
    if levels:
        fields.append(b'"priority":0')
    return b",".join(fields)


def salt_of_key(key_digest: bytes) -> str:
    """Return the salt of whoever has a key, where keys themselves are the tenants."""
    return sha256(b"cache " + key_digest).hexdigest()
