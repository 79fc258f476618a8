"""Cards as the keepers meet them: who waits, who is woken, and memory that stays behind."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable

import pytest

from backends.cards import Back, Cards, Placement
from backends.gpus import Gpu, GpuInventory, GpuLeases, NoGpuError
from backends.inventory import CardUse
from backends.log import Log
from backends.nvidia_smi import User

TWO = GpuInventory(
    tuple(Gpu(device=str(n), uuid=f"GPU-{n}", numa_node=n) for n in range(2)), frozenset({1})
)


class Stage:
    """Cards, a log, and memory that the test sets."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.leases = GpuLeases(TWO)
        self.used_mib: dict[str, int] = {"0": 4, "1": 4}
        self.users: tuple[User, ...] = ()
        self.asked = 0
        self.woken: list[str] = []
        self.cards = Cards(self.leases, Log(self.stream), self.use, poll_s=0.001)

    def use(self) -> CardUse:
        self.asked += 1
        return CardUse(dict(self.used_mib), self.users)

    def take(self, owner: str, count: int = 1, **env: str) -> Placement:
        return self.cards.take(owner, count, env, (), lambda: self.woken.append(owner))

    def back(self, owner: str, *, moves: bool = False, **env: str) -> Back:
        return self.cards.take_back(owner, env, (), lambda: self.woken.append(owner), moves=moves)

    async def noted(self, owner: str) -> None:
        """Wait until what was used before is known."""
        await self.until(lambda: owner in self.cards._used_before)

    async def until(self, look: Callable[[], object]) -> None:
        async with asyncio.timeout(20.0):
            while not look():
                await asyncio.sleep(0.001)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    await stage.cards.close()


async def test_a_placement_is_cards_an_environment_and_a_node(stage: Stage) -> None:
    first, second = stage.take("m-0"), stage.take("m-1")
    assert first.environment == {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert first.prefix == ()
    assert second.devices == ("1",)
    assert second.prefix[0] == "numactl"


async def test_who_finds_none_waits_and_is_woken_in_order(stage: Stage) -> None:
    stage.take("m-0")
    stage.take("m-1")
    for owner in ("m-2", "m-3", "m-4"):
        with pytest.raises(NoGpuError, match=r"m-0 has GPU 0; m-1 has GPU 1"):
            stage.take(owner)
    stage.cards.forget("m-3")
    stage.cards.ended("m-0")
    await stage.until(lambda: stage.woken)
    assert stage.woken == ["m-2", "m-4"]
    assert stage.take("m-2").devices == ("0",)
    stage.cards.ended("m-1")
    await stage.until(lambda: "m-1" not in stage.leases.holders)
    assert stage.woken == ["m-2", "m-4"], "each is woken once for each try"


async def test_a_card_comes_back_when_its_memory_does(stage: Stage) -> None:
    stage.take("m-0")
    await stage.noted("m-0")
    stage.used_mib["0"] = 80_000
    stage.cards.ended("m-0")
    asked = stage.asked
    await stage.until(lambda: stage.asked > asked + 3)
    assert "m-0" in stage.leases.holders
    stage.used_mib["0"] = 100  # not quite as before; drivers breathe
    await stage.until(lambda: not stage.leases.holders)
    assert "gpu_memory_held" not in stage.stream.getvalue()


async def test_memory_that_stays_is_told_with_who_has_it(stage: Stage) -> None:
    stage.take("m-0")
    await stage.noted("m-0")
    stage.used_mib["0"] = 1_961
    stage.users = (User(4242, "GPU-0", 1_957), User(77, "GPU-1", 5))
    stage.cards.ended("m-0")
    await stage.until(lambda: not stage.leases.holders)
    assert '"held":"GPU 0: 1,957 MiB by pid 4242 (1,957 MiB)"' in stage.stream.getvalue()


async def test_an_end_waits_for_memory_unless_hurried(stage: Stage) -> None:
    stage.take("m-0")
    await stage.noted("m-0")
    stage.used_mib["0"] = 80_000
    stage.cards.ended("m-0")
    settling = asyncio.ensure_future(stage.cards.settled())
    asked = stage.asked
    await stage.until(lambda: stage.asked > asked + 2)
    assert not settling.done()
    stage.used_mib["0"] = 4
    await settling
    stage.take("m-0")
    await stage.noted("m-0")
    stage.used_mib["0"] = 80_000
    stage.cards.ended("m-0")
    stage.cards.hurry()
    await stage.cards.settled()
    stage.take("m-1")
    stage.cards.ended("m-1")
    assert "m-1" not in stage.leases.holders, "at once, from then on"
    assert "gpu_memory_held" not in stage.stream.getvalue()


async def test_memory_of_nobody_is_told_too(stage: Stage) -> None:
    stage.cards.claim("old-0", ["1"])  # of a manager before: nobody knows what was used
    stage.used_mib["1"] = 5_000
    stage.cards.ended("old-0")
    await stage.until(lambda: not stage.leases.holders)
    assert "GPU 1: 5,000 MiB by no process that it names" in stage.stream.getvalue()


async def test_what_was_used_before_is_not_asked_back(stage: Stage) -> None:
    stage.used_mib["0"] = 9_000  # a stranger's
    stage.take("m-0")
    await stage.noted("m-0")
    stage.cards.ended("m-0")
    await stage.until(lambda: not stage.leases.holders)
    assert "gpu_memory_held" not in stage.stream.getvalue()


async def test_a_life_too_short_to_use_anything_holds_nothing(stage: Stage) -> None:
    stage.used_mib["0"] = 9_000
    stage.take("m-0")
    stage.cards.ended("m-0")
    assert not stage.leases.holders


async def test_a_restart_does_not_wait_and_keeps_its_cards(stage: Stage) -> None:
    stage.take("m-0")
    stage.used_mib["0"] = 80_000
    await stage.noted("m-0")
    stage.cards.ended("m-0")
    assert stage.take("m-0").devices == ("0",)
    await asyncio.sleep(0.05)
    assert "m-0" in stage.leases.holders, "nobody gives back what is used again"


async def test_pinned_replicas_share_and_nobody_else_gets_the_card(stage: Stage) -> None:
    pinned = stage.take("m-0", 1, CUDA_VISIBLE_DEVICES="0")
    assert pinned == Placement(("0",), {}, ()), "its own environment says it"
    assert stage.take("m-1", 1, CUDA_VISIBLE_DEVICES="0").devices == ("0",)
    assert stage.take("m-2").devices == ("1",)
    stage.used_mib["0"] = 40_000
    stage.cards.ended("m-0")
    assert list(stage.leases.holders) == ["m-1", "m-2"], "what is used may be the other's"
    with pytest.raises(NoGpuError):
        stage.take("m-3")


async def test_without_leases_nothing_happens() -> None:
    cards = Cards(None, Log(io.StringIO()))
    assert cards.take("m-0", 4, {}, (), lambda: None) == Placement()
    cards.claim("m-0", ["0"])
    cards.ended("m-0")
    cards.forget("m-0")
    await cards.close()


async def test_without_eyes_cards_come_back_at_once() -> None:
    leases, woken = GpuLeases(TWO), []
    cards = Cards(leases, Log(io.StringIO()))
    cards.take("m-0", 2, {}, (), lambda: None)
    with pytest.raises(NoGpuError):
        cards.take("m-1", 1, {}, (), lambda: woken.append("m-1"))
    cards.ended("m-0")
    assert not leases.holders
    assert not woken, "first whoever gave them back goes on"
    await asyncio.sleep(0)
    assert woken == ["m-1"]


async def test_a_suspended_one_lends_its_card_once_its_memory_is_free(stage: Stage) -> None:
    stage.take("m-0")
    await stage.noted("m-0")
    stage.used_mib["0"] = 80_000
    stage.cards.lend("m-0")
    asked = stage.asked
    await stage.until(lambda: stage.asked > asked + 2)
    assert "m-0" in stage.leases.holders, "the driver is not done"
    stage.used_mib["0"] = 4
    await stage.until(lambda: not stage.leases.holders)
    assert stage.take("m-1").devices == ("0",)
    with pytest.raises(NoGpuError, match="m-1 has GPU 0"):
        stage.back("m-0")
    stage.cards.ended("m-1")
    await stage.until(lambda: stage.woken == ["m-0"])
    assert stage.back("m-0") == Back(("0",))


async def test_one_that_returns_at_once_finds_its_card(stage: Stage) -> None:
    stage.take("m-0")
    await stage.noted("m-0")
    stage.used_mib["0"] = 80_000
    stage.cards.lend("m-0")
    assert stage.back("m-0") == Back(("0",))
    await asyncio.sleep(0.05)
    assert stage.leases.holders == {"m-0": ("0",)}, "nobody gives back what is used again"


async def test_it_moves_to_another_card_where_it_can(stage: Stage) -> None:
    stage.take("m-0")
    stage.cards.lend("m-0")
    stage.leases.claim("m-1", ["0"])
    with pytest.raises(NoGpuError):
        stage.back("m-0")
    assert stage.back("m-0", moves=True) == Back(("1",), {"GPU-0": "GPU-1"}, ("0",))


async def test_a_pinned_one_returns_to_the_card_that_it_shares(stage: Stage) -> None:
    stage.take("m-0", 1, CUDA_VISIBLE_DEVICES="0")
    stage.take("m-1", 1, CUDA_VISIBLE_DEVICES="0")
    stage.cards.lend("m-0")
    assert stage.back("m-0", CUDA_VISIBLE_DEVICES="0") == Back(("0",))


async def test_what_never_lent_or_has_ended_gets_nothing_back(stage: Stage) -> None:
    stage.take("m-0")
    assert stage.back("m-0") == Back(("0",)), "it has them"
    stage.cards.lend("m-0")
    stage.cards.ended("m-0")
    assert stage.back("m-0") == Back()
    stage.cards.lend("m-1", ["1"])  # of a manager before
    stage.cards.forget("m-1")
    assert stage.back("m-1") == Back()
    assert stage.cards.described(["1", "0"]) == ", ".join(
        g.name or g.device for g in TWO.gpus[::-1]
    )
