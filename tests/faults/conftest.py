"""One `doherty up` with three replicas and two workers for the tests that leave it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.whole import Whole, whole


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tmp_path_factory.mktemp("whole")) as started:
        yield started


@pytest.fixture
def up(shared: Whole) -> Whole:
    """The shared run, whole again after whatever the test before did to it."""
    shared.until_whole()
    shared.until_at_rest()
    return shared
