"""Managers that are killed at each step of each turn; the next one adopts, or cleans up.

Two models share one card, over real managers and simulators that are suspended by SIGSTOP. After
every death: each process belongs to a life that the journal knows, no card and no port is
anybody's twice, what is published as serving serves, and the replica that was in the turn comes
back to service.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.fakes.mortal_region import MortalRegion
from tests.fakes.region import alive

pytestmark = pytest.mark.faults

# What is done to the replica, and after which steps of it its manager dies. One that is not here
# is followed, or preceded, by one that is, with nothing between them.
STARTS = [
    "before note Launch",
    "after note Launch",
    "after spawn",
    "after note Started",
    "after note Ready",
]
SLEEPS = [
    "before note Nap turning asleep",
    "after note Nap turning asleep",
    "after post /sleep",
    "after note Nap asleep",
]
SUSPENSIONS = [
    "after note Suspension turning",
    "after suspend",
    "after note Suspension suspended",
]
RESUMPTIONS = [
    "before note Suspension suspended turning",
    "after note Suspension suspended turning",
    "after resume",
    "after note Suspension",
]
WAKES = [
    "after note Nap turning asleep",
    "after post /wake_up",
    "after note Nap",
    "after note Ready",
]
ENDS = [
    "after SIGTERM",
    "before note Ended",
    "after note Ended",
]


class Card(MortalRegion):
    """Two models that share a card."""

    def settle(self) -> None:
        """Have `a` serve, whatever became of it, and `b` suspended."""
        self.until(lambda: len(self.fleet()) == 2, "a fleet")
        self.check()

        def there() -> bool:
            fleet = self.fleet()
            a, b = fleet["a-0"], fleet["b-0"]
            if (a.state.value, a.asleep) == ("ready", False):
                return True
            for name, record in (("b-0", b), ("a-0", a)):
                if record.state.value == "ready":
                    lowered = "sleep?rung=suspended" if name == "b-0" else "wake"
                    if (name == "a-0") == record.asleep:
                        self.try_(name, lowered)
            return False

        self.until(there, "a serves")
        self.serves("a-0")
        self.check()


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    """A card with both models started, `a` serving and `b` suspended."""
    folder = tmp_path_factory.mktemp("card")
    pool = {"gpus": 1, "sleep": True}
    card = Card(folder, [pool | {"name": name} for name in ("a", "b")], gpus="0")
    try:
        card.start()
        card.is_("a-0", "ready")
        card.wish("a-0", "sleep?rung=suspended")
        card.is_("b-0", "ready")
        card.settle()
        yield card
    finally:
        card.clean()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _settled(card: Card) -> Iterator[None]:
    yield
    (card.folder / "die").unlink(missing_ok=True)
    if not alive(card.manager):
        card.start()


@pytest.mark.parametrize("step", STARTS)
def test_in_a_start(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.dies(step, lambda: os.kill(pid, signal.SIGKILL))
    card.start()
    card.settle()
    assert card.fleet()["a-0"].pid != pid


@pytest.mark.parametrize("step", [*SLEEPS, *SUSPENSIONS])
def test_on_the_way_down(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.dies(step, lambda: card.wish("a-0", "sleep?rung=suspended"))
    card.start()
    card.until(lambda: card.fleet().get("a-0"), "it is published")
    known = step in [SLEEPS[0], SLEEPS[-1], *SUSPENSIONS]
    card.settle()
    assert (card.fleet()["a-0"].pid == pid) == known, "only what nobody knows is started anew"


@pytest.mark.parametrize("step", [*RESUMPTIONS, *WAKES])
def test_on_the_way_up(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.wish("a-0", "sleep?rung=suspended")
    card.is_("a-0", "ready", asleep=True)
    card.dies(step, lambda: card.wish("a-0", "wake"))
    card.start()
    card.settle()
    known = step in [*RESUMPTIONS, *WAKES[2:]]
    assert (card.fleet()["a-0"].pid == pid) == known


@pytest.mark.parametrize("step", ENDS)
def test_in_a_restart(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.dies(step, lambda: card.wish("a-0", "restart"))
    card.start()
    card.settle()
    assert step != "after SIGTERM" or not alive(pid)


def test_a_suspended_one_is_ended_with_its_manager(card: Card) -> None:
    card.wish("a-0", "sleep?rung=suspended")
    card.is_("a-0", "ready", asleep=True)
    os.kill(card.manager, signal.SIGTERM)
    card.until(lambda: not alive(card.manager), "the end of the manager")
    assert card.processes() == {}
