"""Seeds, and every crash ever found, hold their laws; no fuzzer is needed for that."""

from __future__ import annotations

import random

import pytest

from tests.conformance.mutate import mutated
from tests.fuzz.targets import FOLDER, TARGETS, kept


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_seeds_and_crashes_hold_the_law(name: str) -> None:
    law = TARGETS[name].law
    for octets in TARGETS[name].seeds():
        law(octets)
    for where, octets in kept(name):
        try:
            law(octets)
        except Exception as error:
            error.add_note(where)
            raise


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_some_damage_holds_the_law(name: str) -> None:
    chance = random.Random(name)
    seeds = TARGETS[name].seeds()
    for _ in range(400):
        TARGETS[name].law(mutated(chance, seeds))


def test_what_is_kept_belongs_to_a_target() -> None:
    for kind in ("seeds", "crashes"):
        folders = {path.name for path in (FOLDER / kind).glob("*") if path.is_dir()}
        assert folders <= set(TARGETS)
    assert sum(1 for name in TARGETS for _ in kept(name)) > 0
