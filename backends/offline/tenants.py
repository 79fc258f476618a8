"""Whose a file or batch is: the tenant, named by a digest of the key that came with the request.

Keys themselves are never stored. The digest is one-way and its own domain (BLAKE2b with a
personalisation), so that whoever reads the database learns no key and cannot match it with digests
of the same keys elsewhere. Requests without a key are one tenant of their own. Where the proxy
demands a key, so does this service: it may be reached without the proxy.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from backends.offline.api_errors import ApiError

_PERSON = b"doherty tenant"  # up to 16 octets


def presented_key(headers: Mapping[str, str]) -> str:
    """Return the key in a request's headers, "" for none."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip()


def owner_of(headers: Mapping[str, str], api_key: str | None) -> str:
    """Return the tenant. Raises `ApiError` where a key is demanded that did not come."""
    key = presented_key(headers)
    if api_key is not None and not same(key, api_key):
        message = "Incorrect API key provided." if key else "You didn't provide an API key."
        raise ApiError(401, message, code="invalid_api_key")
    digest = hashlib.blake2b(_octets(key), digest_size=16, person=_PERSON)
    return digest.hexdigest()


def same(one: str, other: str) -> bool:
    """Compare two secrets in a time that says nothing of them."""
    return hmac.compare_digest(_octets(one), _octets(other))


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
