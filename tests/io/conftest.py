"""The bench on fake connections; when a test ends, nothing may be held any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from proxy.core import limits
from tests.fakes.plane import Bench


@pytest.fixture
async def make_bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Bench]]:
    made: list[Bench] = []
    # A fake connection has the rest of what was refused in hand: there is no more to wait for.
    monkeypatch.setattr(limits, "LINGER_PAUSE_S", 0.0)

    def make(*args: object, **config: object) -> Bench:
        made.append(Bench(*args, **config))  # type: ignore[arg-type]  # passed on as they came
        return made[-1]

    yield make
    for bench in made:
        await bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """A plane with one replica, `a`, that serves model `m`."""
    return make_bench()
