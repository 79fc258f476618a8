"""The form of keys."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.keys.making import RANDOM_BYTES, digest_of, miscopied, new_key

_OCTETS = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)


@given(_OCTETS)
def test_every_key_has_the_form_and_its_checksum(random: bytes) -> None:
    key = new_key(random)
    assert re.fullmatch(r"doh_[0-9A-Za-z]{8}_[0-9A-Za-z]{49}", key.secret)
    assert key.secret.split("_")[1] == key.key_id
    assert not miscopied(key.secret)
    assert key.digest == digest_of(key.secret)
    assert key.secret not in repr(key.digest)


@given(_OCTETS, _OCTETS)
def test_the_secret_holds_all_of_its_random_bits(one: bytes, other: bytes) -> None:
    same = new_key(one).secret.split("_")[2][:43] == new_key(other).secret.split("_")[2][:43]
    assert same == (one[8:] == other[8:])


@given(_OCTETS, st.integers(4, 61), st.sampled_from("0aZ9"))
def test_one_wrong_character_is_noticed(random: bytes, at: int, character: str) -> None:
    secret = new_key(random).secret
    wrong = secret[:at] + character + secret[at + 1 :]
    assert miscopied(wrong) == (wrong != secret)


@pytest.mark.parametrize("secret", ["sk-0123456789", "", "doH_x"])
def test_keys_of_others_are_not_judged(secret: str) -> None:
    assert not miscopied(secret)


@pytest.mark.parametrize("lost", [1, 6, 20])
def test_a_key_that_lost_its_end_is_noticed(lost: int) -> None:
    assert miscopied(new_key(bytes(RANDOM_BYTES)).secret[:-lost])
