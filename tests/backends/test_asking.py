"""What works here: a yes is kept, a no is asked again after a while, beside whoever asks."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from backends import serve
from backends.log import Log
from backends.snapshots.asking import AGAIN_S, Asking
from backends.tasks import cancel_all, spawn
from proxy.config import OfflineConfig


class Machine:
    """Says what the test tells it to, once the test lets it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.says = "no"
        self.askers: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def ask(self) -> str:
        self.askers.append(threading.current_thread().name)
        assert self.free.wait(10.0)
        return self.says

    def asking(self) -> Asking[str]:
        return Asking(self.ask, lambda said: said == "yes", lambda: self.now_s)


def test_a_no_is_asked_again_after_a_while_and_nobody_waits_for_it() -> None:
    machine = Machine()
    asking = machine.asking()
    assert asking.answer() == "no"
    machine.says, machine.now_s = "yes", AGAIN_S - 1.0
    assert asking.answer() == "no"
    assert len(machine.askers) == 1
    machine.now_s = AGAIN_S
    machine.free.clear()
    assert [asking.answer(), asking.answer()] == ["no", "no"], "while it is found out, once"
    machine.free.set()
    asking.settle()
    assert asking.answer() == "yes"
    assert machine.askers == [threading.current_thread().name, "works-here"]


def test_a_yes_is_kept() -> None:
    machine = Machine()
    machine.says = "yes"
    asking = machine.asking()
    asking.answer()
    machine.now_s = 1e6
    assert asking.answer() == "yes"
    asking.settle()
    assert len(machine.askers) == 1


async def test_a_reload_asks_before_it_is_taken_and_beside_the_loop(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("models: [{name: m, pools: [{engine: simulator, snapshot: true}]}]")
    told: list[tuple[str, bool]] = []
    done, orders = asyncio.Event(), serve.Orders()

    def note(what: str) -> None:
        told.append((what, threading.current_thread() is threading.main_thread()))

    class Manager:
        keepers = ()
        offline = OfflineConfig()

        def reload(self, config: object) -> None:
            note("reload")
            done.set()

    manager: Any = Manager()
    orders.reload.set()
    reloading = serve._reload_on_order(manager, orders, str(path), lambda _: note("ahead"), Log())
    task = spawn(reloading, "reload", Log())
    await asyncio.wait_for(done.wait(), 10.0)
    await cancel_all([task])
    assert told == [("ahead", False), ("reload", True)]
