"""One browser for all of these tests; without one they are skipped, by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.browser import Browser, missing


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with Browser() as opened:
        yield opened
