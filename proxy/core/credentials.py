"""The one credential of a request: where it may stand, and what is none.

It comes as a bearer token (RFC 6750 §2.1), or in `x-api-key`, as Anthropic's clients send it.
Everything that could be read in two ways is refused rather than chosen from, because the next
reader might choose otherwise. That a field comes twice, or folded over lines, the reader of heads
has refused by then (RFC 9110 §5.3: only list-valued fields may repeat; RFC 9112 §5.2). Here it is:

- both fields with different values (RFC 6750 §2: no more than one method in a request; two that say
  the same are what some SDKs send, and there is nothing to choose);
- a scheme other than Bearer: a password is no key, and a key sent as one was typed into the wrong
  place (RFC 9110 §11.6.1: the answer names the scheme);
- several values, joined by hand or by an intermediary (RFC 9110 §5.3), and whatever else is not one
  run of visible ASCII: a token holds neither spaces nor octets above 0x7E (RFC 6750 §2.1);
- nothing at all behind a name or a scheme, or more octets than any token has.

A query string and a trailer are never looked at. Addresses end up in logs and histories (RFC 6750
§5.3), and trailers come when the request has long been judged (RFC 9110 §6.5.1). What a client puts
into its query nevertheless goes no further than to us (`without_keys`).

No refusal holds any part of what came.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from proxy.core import claim_limits
from proxy.core.http1 import RequestHead

API_KEY: Final = b"x-api-key"
# By these the SDKs of OpenAI and Anthropic, and those of Azure and Google, send keys. No engine
# needs the last two, so that none of them goes on where engines are to see no client's key.
FIELDS: Final = frozenset((b"authorization", API_KEY, b"api-key", b"x-goog-api-key"))
_IN_QUERIES: Final = frozenset(
    (b"api_key", b"api-key", b"apikey", b"key", b"access_token", b"token", b"authorization")
)
_TOKEN: Final = re.compile(rb"[\x21-\x7e]+")

_HOW: Final = "send one key as 'Authorization: Bearer KEY'"


def read_credential(head: RequestHead) -> tuple[bytes, str]:
    """Return the token, `b""` for none; and why what came is none, empty where it is right."""
    special = head.special
    key = special.get(API_KEY)
    authorization = special.get(b"authorization")
    if authorization is None:
        return (b"", "") if key is None else _judged(key)
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        if not authorization:
            return b"", f"the Authorization field is empty; {_HOW}"
        return b"", f"the scheme of the Authorization field is not Bearer; {_HOW}"
    token, problem = _judged(rest.strip(b" "))
    if key is not None and key != token and not problem:
        return b"", f"Authorization and x-api-key hold different keys; {_HOW}"
    return token, problem


def _judged(token: bytes) -> tuple[bytes, str]:
    if not token:
        return b"", f"the API key is empty; {_HOW}"
    if len(token) > claim_limits.CREDENTIAL_BYTES_MAX:
        return b"", f"the API key is over {claim_limits.CREDENTIAL_BYTES_MAX} octets"
    if not _TOKEN.fullmatch(token):
        return b"", f"the API key is not one word of visible ASCII characters; {_HOW}"
    return token, ""


def without_keys(query: bytes) -> bytes:
    """Return a query, with its question mark, without what people take for a place for keys."""
    if not query:
        return query
    parts = query[1:].split(b"&")
    kept = [part for part in parts if _name(part) not in _IN_QUERIES]
    if len(kept) == len(parts):
        return query
    return b"?" + b"&".join(kept) if kept else b""


def _name(part: bytes) -> bytes:
    return unquote_to_bytes(part.partition(b"=")[0]).lower()
