"""How proxy and offline service speak of tenants whose requests they pass to each other.

The service keeps files and jobs by the credential that comes with a request. A tenant has several
keys, and they change; so what comes is derived from the tenant and from the salt of the set of
keys: the same whatever key was shown, of no use at the proxy, and nothing that can be guessed. The
tenant's own name comes beside it, so that what its jobs take is counted as its own, and a proof
that all of it is the proxy's word: an HMAC with a secret that only these two have (RFC 2104). With
the same secret the service shows itself when it sends lines of jobs through the proxy, and with the
same field it says for whom.
"""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import quote, unquote

TENANT_FIELD = "x-doherty-tenant"
PROOF_FIELD = "x-doherty-proof"
DEFAULT_TENANT = "default"  # whose policy those have that no one has configured
TENANT_CHARACTERS_MAX = 1024


def proof_of(internal_key: str, credential: str, tenant: str) -> str:
    """Return what shows that this credential is this tenant's."""
    said = f"tenant {tenant}\0{credential}".encode()
    return hmac.new(internal_key.encode(), said, hashlib.sha256).hexdigest()


def owner_unknown(tenant: str) -> str:
    """Return whose files and jobs those of a tenant are that is not configured."""
    return f"{DEFAULT_TENANT} {tenant}"


def tenant_of(owner: str) -> tuple[str, bool]:
    """Return the tenant of an owner, and whether it is one that is not configured."""
    name = owner.removeprefix(f"{DEFAULT_TENANT} ")
    return name, name != owner


def in_field(tenant: str) -> str:
    """Write a name, of whatever characters, as the value of a field."""
    return quote(tenant, safe="")


def from_field(value: str) -> str:
    """Return the name that `in_field` wrote."""
    return unquote(value)
