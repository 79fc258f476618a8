"""What can be done to a set of keys. Pure: a set and a moment in, the next set out.

A key that is over stays in the set, so that lists can say since when, until it is pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from proxy.contract.keys import KeyRecord, KeySet

IN_FORCE, EXPIRED, REVOKED = "in force", "expired", "revoked"


class NoSuchKeyError(Exception):
    """No key, or more than one, is meant by this; the text says which there are."""


def state_of(key: KeyRecord, now_s: float) -> str:
    """Say in a word how a key stands."""
    if key.revoked_at and key.revoked_at <= now_s:
        return REVOKED
    return EXPIRED if key.expires_at and key.expires_at <= now_s else IN_FORCE


def find(keys: KeySet, name: str, now_s: float) -> KeyRecord:
    """Return the key of this id, or the only one in force of this name.

    Raises `NoSuchKeyError`.
    """
    for key in keys.keys:
        if key.key_id == name:
            return key
    named = [key for key in keys.keys if key.name == name]
    named = [key for key in named if state_of(key, now_s) == IN_FORCE] or named
    if len(named) == 1:
        return named[0]
    if not named:
        raise NoSuchKeyError(f"no key has the id or the name '{name}'; `doherty keys list` has all")
    ids = ", ".join(key.key_id for key in named)
    raise NoSuchKeyError(f"several keys have the name '{name}': say which by its id: {ids}")


def added(keys: KeySet, key: KeyRecord) -> KeySet:
    """Return the set with one more. Raises `NoSuchKeyError` when it is there already."""
    for other in keys.keys:
        if other.digest == key.digest:
            raise NoSuchKeyError(f"this key is there already: {other.key_id} of {other.tenant}")
    return _next(keys, (*keys.keys, key))


def revoked(keys: KeySet, ids: Iterable[str], now_s: float) -> KeySet:
    """Return the set with these ended at this moment; those that were before stay as they are."""
    meant = frozenset(ids)
    return _next(
        keys,
        [
            replace(key, revoked_at=now_s)
            if key.key_id in meant and state_of(key, now_s) != REVOKED
            else key
            for key in keys.keys
        ],
    )


def expiring(keys: KeySet, key_id: str, at_s: float) -> KeySet:
    """Return the set with this key ending then, or when it would have, if that is sooner."""
    return _next(
        keys,
        [
            replace(key, expires_at=min(at_s, key.expires_at or at_s))
            if key.key_id == key_id
            else key
            for key in keys.keys
        ],
    )


def pruned(keys: KeySet, before_s: float) -> KeySet:
    """Return the set without those that were over by then."""
    return _next(keys, [key for key in keys.keys if state_of(key, before_s) == IN_FORCE])


def successor(
    old: KeyRecord, key_id: str, digest: str, *, now_s: float, expires_s: float
) -> KeyRecord:
    """Return a key that may what `old` may."""
    return replace(
        old, key_id=key_id, digest=digest, created_at=now_s, expires_at=expires_s, revoked_at=0.0
    )


def _next(keys: KeySet, records: Sequence[KeyRecord]) -> KeySet:
    return replace(keys, keys=tuple(records))
