"""What one key may do: its tenant's policy with the key's own narrowing laid over it.

A key only ever narrows: what both name is what it may ask for, and where one of them names nothing
it is what the other names. Both planes read this, so that `doherty check` says what proxies do.
Nothing left means a key that can never be used; that is said where keys are made and checked, and
the proxy refuses it like one that it does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import get_args

import msgspec

from proxy.config_access import AccessConfig, TenantConfig
from proxy.config_models import WorkClass
from proxy.contract.keys import KeyRecord

WORK_CLASSES: tuple[WorkClass, ...] = get_args(WorkClass)


class KeyPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome for one key. `None`: whatever there is; `flaw`: why it can never be used."""

    tenant: str
    models: frozenset[str] | None
    classes: tuple[WorkClass, ...]  # the most urgent first
    regions: frozenset[str] | None
    flaw: str = ""


def policy_of(tenant: TenantConfig, key: KeyRecord | None = None) -> KeyPolicy:
    """Lay a key over its tenant; without one, for those whose tokens name the tenant itself."""
    own = key or KeyRecord(key_id="", tenant=tenant.name, digest="0" * 64)
    models = _both(tenant.models, own.models)
    allowed = _both(tenant.classes, own.classes)
    classes = tuple(name for name in WORK_CLASSES if allowed is None or name in allowed)
    regions = _both(tenant.regions, own.regions)
    flaw = ""
    for what, left in (("models", models), ("classes", classes), ("regions", regions)):
        if left is not None and not left:
            flaw = f"none of its {what} is one that its tenant {tenant.name} may use"
            break
    return KeyPolicy(tenant=tenant.name, models=models, classes=classes, regions=regions, flaw=flaw)


def _both(one: Collection[str], other: Collection[str]) -> frozenset[str] | None:
    if one and other:
        return frozenset(one) & frozenset(other)
    return frozenset(one or other) or None


def class_granted(wanted: str, classes: Collection[str]) -> str:
    """Return the class itself where it is allowed, else the next lower that is.

    One that is lower than all of them needs no leave.
    """
    lower = WORK_CLASSES[[str(name) for name in WORK_CLASSES].index(wanted) :]
    return next((name for name in lower if name in classes), wanted)


def is_limited(tenant: TenantConfig) -> bool:
    """Whether anything of it has to be counted before it is let in."""
    return bool(
        tenant.requests_per_min
        or tenant.tokens_per_min
        or tenant.max_concurrent
        or tenant.tokens_per_day
        or tenant.budget_per_day is not None
    )


def flaws_of(keys: Iterable[KeyRecord], access: AccessConfig) -> list[str]:
    """Say of each key that is still meant to work why it cannot, by its public id."""
    tenants = {tenant.name: tenant for tenant in access.tenants}
    found = []
    for key in keys:
        narrows = key.models or key.classes or key.regions  # else it may what its tenant may
        if key.revoked_at or (key.tenant in tenants and not narrows):
            continue
        tenant = tenants.get(key.tenant)
        if tenant is None:
            found.append(f"key {key.key_id}: its tenant {key.tenant!r} is not configured")
        elif flaw := policy_of(tenant, key).flaw:
            found.append(f"key {key.key_id}: {flaw}")
    return found


def shared_key(keys: Iterable[KeyRecord], api_key: str | None) -> str:
    """Say whose key the proxy's own is as well, which then is no key for everything any more."""
    if api_key is None:
        return ""
    digest = hashlib.sha256(api_key.encode()).hexdigest()
    for key in keys:
        if key.digest == digest:
            return (
                f"api_key (DOHERTY_API_KEY) is the key {key.key_id} of tenant {key.tenant} and "
                "counts as that, so no key is for everything and engines get none; unset it, or "
                "set another"
            )
    return ""
