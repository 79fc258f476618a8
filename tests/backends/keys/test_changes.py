"""What is done to sets of keys."""

from __future__ import annotations

import pytest

from backends.keys.changes import (
    EXPIRED,
    IN_FORCE,
    REVOKED,
    NoSuchKeyError,
    added,
    expiring,
    find,
    pruned,
    revoked,
    state_of,
    successor,
)
from proxy.contract.keys import KeyRecord, KeySet


def key(number: int, **more: object) -> KeyRecord:
    values = {"key_id": f"k{number}", "tenant": "t", "digest": f"{number:064x}", **more}
    return KeyRecord(**values)  # type: ignore[arg-type]


def keys(*records: KeyRecord) -> KeySet:
    return KeySet(version=7, salt="s" * 16, keys=records)


@pytest.mark.parametrize(
    ("times", "state"),
    [
        ({}, IN_FORCE),
        ({"expires_at": 99.0}, EXPIRED),
        ({"expires_at": 100.0}, EXPIRED),
        ({"expires_at": 101.0}, IN_FORCE),
        ({"revoked_at": 100.0, "expires_at": 50.0}, REVOKED),
    ],
)
def test_state(times: dict[str, float], state: str) -> None:
    assert state_of(key(1, **times), 100.0) == state


def test_every_change_keeps_the_salt() -> None:
    before = keys(key(1))
    for after in (
        added(before, key(2)),
        revoked(before, ["k1"], 5.0),
        expiring(before, "k1", 9.0),
        pruned(before, 3.0),
    ):
        assert after.salt == before.salt


def test_a_key_that_is_there_is_not_added_again() -> None:
    with pytest.raises(NoSuchKeyError, match="there already: k1 of t"):
        added(keys(key(1)), key(2, digest=f"{1:064x}"))


def test_a_revoked_key_keeps_the_moment_in_which_it_was() -> None:
    once = revoked(keys(key(1), key(2)), ["k1"], 5.0)
    twice = revoked(once, ["k1", "k2"], 9.0)
    assert [k.revoked_at for k in twice.keys] == [5.0, 9.0]


def test_an_end_is_never_put_off() -> None:
    assert expiring(keys(key(1, expires_at=5.0)), "k1", 9.0).keys[0].expires_at == 5.0
    assert expiring(keys(key(1)), "k1", 9.0).keys[0].expires_at == 9.0


def test_what_is_over_long_enough_is_forgotten() -> None:
    before = keys(key(1, revoked_at=5.0), key(2, expires_at=6.0), key(3, revoked_at=50.0), key(4))
    assert [k.key_id for k in pruned(before, 10.0).keys] == ["k3", "k4"]


def test_a_key_is_found_by_its_id_or_by_a_name_that_one_in_force_has() -> None:
    some = keys(key(1, name="a", revoked_at=5.0), key(2, name="a"), key(3, name="k1"))
    assert find(some, "k1", 10.0).key_id == "k1"
    assert find(some, "a", 10.0).key_id == "k2"
    with pytest.raises(NoSuchKeyError, match="no key has the id or the name 'b'"):
        find(some, "b", 10.0)
    with pytest.raises(NoSuchKeyError, match=r"several keys have the name 'a'.*k1, k2"):
        find(some, "a", 1.0)


def test_a_successor_may_what_its_predecessor_may() -> None:
    old = key(1, name="n", models=("m",), classes=("offline",), regions=("eu",), revoked_at=3.0)
    new = successor(old, "k9", f"{9:064x}", now_s=10.0, expires_s=20.0)
    assert (new.tenant, new.name, new.models, new.classes, new.regions) == (
        *("t", "n", ("m",), ("offline",)),
        ("eu",),
    )
    assert (new.key_id, new.created_at, new.expires_at, new.revoked_at) == ("k9", 10.0, 20.0, 0.0)
