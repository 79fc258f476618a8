"""Everybody who may ask, by the digest of what he shows: worked out when keys or policy change.

A request costs one look-up. What is looked up is a SHA-256, so how long that takes says nothing of
a key: whoever wants to come near a stored digest octet by octet would have to find keys that hash
close to it, which is to search the whole space. Equality is then settled in constant time. Nothing
ends early: a wrong key, a revoked one and one of no tenant all take the same look-up.

Revocation does not ask the clock, which may run behind that of whoever revoked; expiry has to.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from proxy.config_access import AccessConfig, TenantConfig
from proxy.config_policy import KeyPolicy, is_limited, policy_of
from proxy.contract.behalf import DEFAULT_TENANT, owner_unknown, tenant_of
from proxy.contract.keys import KeyRecord, KeySet
from proxy.core.classes import NAMES
from proxy.core.principal import ANYBODY, INTERNAL, Principal
from proxy.errors import InvalidRequestError, KeysUnknownError, ProxyError, UnauthorizedError

_MISSING: Final = "no API key came; send it as 'Authorization: Bearer KEY'"
_WRONG: Final = "the API key is wrong; send it as 'Authorization: Bearer KEY'"
_NOBODY: Final = sha256(b"").digest()


class Principals:
    """The table of one reading of keys and configuration. It is never changed."""

    __slots__ = (
        "_policies", "_refused", "_salt", "_table", "_tenants", "complete", "demanded", "named",
        "own_key",
    )  # fmt: skip

    def __init__(
        self,
        access: AccessConfig,
        keys: KeySet | None = None,
        api_key: str | None = None,
        *,
        awaited: bool = False,
        internal_key: str | None = None,
        secret: str = "",
    ) -> None:
        """`keys` is None where none have been told; `awaited`: some will be.

        `secret` is the operator's: where tokens stand in for keys, it does so for their salt.
        """
        self._tenants = {tenant.name: tenant for tenant in access.tenants}
        self._salt = (keys.salt if keys is not None else secret).encode()
        self._table: dict[bytes, tuple[bytes, Principal]] = {}
        self._refused: dict[bytes, str] = {}
        self._policies: dict[tuple[object, ...], tuple[KeyPolicy, int]] = {}
        # Whether requests are somebody's in particular: then engines see no key, and nobody hears
        # of models that are not his.
        self.named = keys is not None or awaited or access.jwt is not None or bool(access.tenants)
        self.demanded = self.named or api_key is not None
        self.complete = keys is not None or not awaited
        for record in keys.keys if keys is not None else ():
            self._add(record)
        self._policies.clear()  # they were of use while all keys were read
        # The proxy's own key, for everything, to engines too. One that is a tenant's as well is his
        # alone, and bound by what he may: `DOHERTY_API_KEY` is also what clients call their key.
        self.own_key = api_key
        if api_key is not None:
            digest = sha256(api_key.encode()).digest()
            if digest in self._table or digest in self._refused:
                self.own_key = None
            else:
                self._table[digest] = (digest, ANYBODY)
        if internal_key is not None:
            digest = sha256(internal_key.encode()).digest()
            self._table[digest] = (digest, INTERNAL)

    def _add(self, record: KeyRecord) -> None:
        digest = bytes.fromhex(record.digest)
        tenant = self._tenants.get(record.tenant)
        if record.revoked_at:
            self._refused[digest] = "the API key has been revoked"
            return
        if tenant is None:
            self._refused[digest] = "the API key is of a tenant that is not configured here"
            return
        policy, bits = self._policy_of(tenant, record)
        if policy.flaw:
            self._refused[digest] = "the API key may not be used for anything"
            return
        principal = self._principal(tenant, policy, bits, record.key_id, tenant.name)
        principal.expires_s = record.expires_at
        self._table[digest] = (digest, principal)

    def _policy_of(self, tenant: TenantConfig, key: KeyRecord) -> tuple[KeyPolicy, int]:
        """Return the policy, and its classes as bits. Most keys of a tenant have the same."""
        same = (tenant.name, key.models, key.classes, key.regions)
        found = self._policies.get(same)
        if found is None:
            policy = policy_of(tenant, key)
            found = self._policies[same] = (policy, class_bits(policy.classes))
        return found

    def _principal(
        self, tenant: TenantConfig, policy: KeyPolicy, bits: int, key_id: str, owner: str
    ) -> Principal:
        who = Principal(tenant.name, key_id)
        who.owner = owner
        who.weight = tenant.weight
        if tenant.work_class is not None:
            who.default_class = NAMES.index(tenant.work_class)
        who.classes = bits
        who.models, who.regions = policy.models, policy.regions
        who.narrowed = (policy.models, policy.regions) != (
            frozenset(tenant.models) or None,
            frozenset(tenant.regions) or None,
        )
        who.isolated = tenant.cache_isolation
        if who.isolated:
            who.salt = self.derived("cache", owner)
        who.slo_ttft_s = tenant.slo_ttft_ms / 1000.0
        who.limited = is_limited(tenant)
        return who

    def derived(self, purpose: str, owner: str) -> str:
        """Return what nobody can guess who does not know the salt, the same for ever."""
        return hmac.new(self._salt, f"{purpose} {owner}".encode(), sha256).hexdigest()

    def of_tenant(self, name: str, key_id: str, *, unknown: bool = False) -> Principal | None:
        """Return a new principal for a tenant that something else than a key has named.

        `unknown`: one that is not configured has the policy, and the limits, of tenant `default`;
        what it owns stays its own.
        """
        tenant, owner = self._tenants.get(name), name
        if tenant is None and unknown:
            tenant, owner = self._tenants.get(DEFAULT_TENANT), owner_unknown(name)
        if tenant is None:
            return None
        policy = policy_of(tenant)
        return self._principal(tenant, policy, class_bits(policy.classes), key_id, owner)

    def on_behalf(self, owner: str) -> Principal:
        """Return one who may what the tenant may that owns a job. Raises `ProxyError`."""
        name, unknown = tenant_of(owner)
        principal = self.of_tenant(name, INTERNAL.key_id, unknown=unknown)
        if principal is None:
            # Not 401: the service has the right key, and others' lines are to go on.
            raise InvalidRequestError("the tenant of this job is not configured any more")
        principal.rated = False
        return principal

    def find(self, digest: bytes, unix_s: float) -> Principal | None:
        """Return who shows what has this digest, if he may ask now."""
        entry = self._table.get(digest)
        if entry is None or not hmac.compare_digest(digest, entry[0]):
            return None
        principal = entry[1]
        return principal if not principal.expires_s or unix_s < principal.expires_s else None

    def refusal(self, digest: bytes) -> ProxyError:
        """Return why `find` found nobody. Only who has the key itself learns what became of it."""
        if digest == _NOBODY:
            return UnauthorizedError(_MISSING)
        if digest in self._refused:
            return UnauthorizedError(self._refused[digest])
        if digest in self._table:
            return UnauthorizedError("the API key has expired")
        if not self.complete:
            return KeysUnknownError("this proxy has not been told yet which API keys there are")
        return UnauthorizedError(_WRONG)


def class_bits(names: Sequence[str]) -> int:
    """Return the bits of classes as `Principal.classes` has them."""
    bits = 0
    for name in names:
        bits |= 1 << NAMES.index(name)
    return bits
