"""Whose a file or batch is: the tenant, named by a digest of the credential that came.

Credentials themselves are never stored. The digest is one-way and its own domain (BLAKE2b with a
personalisation), so that whoever reads the database learns no key and cannot match it with digests
of the same keys elsewhere. Requests without a key are one tenant of their own.

Where the proxy demands a key, so does this service: it may be reached without the proxy. Where keys
are tenants', it takes the word of the proxy alone (`contract.behalf`): of whoever shows that he
knows the secret that the two share, or the one key that may everything.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

import msgspec

from backends.offline.api_errors import ApiError
from proxy.config import ProxyConfig
from proxy.config_access import TenantConfig
from proxy.contract.behalf import (
    DEFAULT_TENANT,
    PROOF_FIELD,
    TENANT_CHARACTERS_MAX,
    TENANT_FIELD,
    from_field,
    proof_of,
    tenant_of,
)

_PERSON = b"doherty tenant"  # up to 16 octets


class Asker(msgspec.Struct, frozen=True):
    """Who asks: the owner of what he makes, and the tenant's name, where the proxy says one."""

    owner: str
    tenant: str = ""


class Door(msgspec.Struct, frozen=True):
    """What is demanded of those who ask."""

    api_key: str | None = None
    internal_key: str | None = None

    @staticmethod
    def of(config: ProxyConfig) -> Door:
        return Door(config.api_key, config.internal_key)

    def asker(self, headers: Mapping[str, str]) -> Asker:
        """Return who asks. Raises `ApiError` where a key is demanded that did not come."""
        key = presented_key(headers)
        field = headers.get(TENANT_FIELD, "")
        if self.internal_key is not None and field:
            tenant = from_field(field)[:TENANT_CHARACTERS_MAX]
            proof = headers.get(PROOF_FIELD, "")
            if not same(proof, proof_of(self.internal_key, key, tenant)):
                raise ApiError(
                    401, "Only the proxy may speak for a tenant.", code="invalid_api_key"
                )
            return Asker(_digest(key), tenant)
        if self.api_key is not None:
            if not same(key, self.api_key):
                message = "Incorrect API key provided." if key else "You didn't provide an API key."
                raise ApiError(401, message, code="invalid_api_key")
        elif self.internal_key is not None:
            message = "Ask the proxy: keys are not known here."
            raise ApiError(401, message, code="invalid_api_key")
        return Asker(_digest(key))


class Rights:
    """Which models the jobs of each tenant may ask for, as the proxy judges their lines.

    Asked once, before a job begins: engine workers compute lines that pass no proxy.
    """

    def __init__(self, tenants: Sequence[TenantConfig]) -> None:
        self.configure(tenants)

    def configure(self, tenants: Sequence[TenantConfig]) -> None:
        """Go by these from now on; none: whoever keeps tenants elsewhere judges there."""
        self._models = {tenant.name: tenant.models for tenant in tenants}

    def may_ask(self, owner: str, model: str) -> bool:
        """Return whether the jobs of this tenant, as the proxy names it, may ask for a model."""
        if not owner or not self._models:
            return True
        name, unknown = tenant_of(owner)
        models = self._models.get(DEFAULT_TENANT if unknown else name)
        return models is not None and (not models or model in models)


def presented_key(headers: Mapping[str, str]) -> str:
    """Return the key in a request's headers, "" for none."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip()


def same(one: str, other: str) -> bool:
    """Compare two secrets in a time that says nothing of them."""
    return hmac.compare_digest(_octets(one), _octets(other))


def _digest(key: str) -> str:
    return hashlib.blake2b(_octets(key), digest_size=16, person=_PERSON).hexdigest()


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
