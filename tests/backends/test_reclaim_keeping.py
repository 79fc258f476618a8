"""Notices as the manager follows them: over fakes, and with manager and engines as processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from typing_extensions import override

from backends.cards import Cards
from backends.fetch import Answer
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.log import Log
from backends.notices import Reclaims, RefusedNoticeError
from backends.snapshots.base import Capability
from tests.fakes.provider import FakeFetch
from tests.fakes.suspender import FakeSuspender
from tests.fakes.world import World, configuration

POOL = "[{engine: simulator, gpus: 1, replicas: 2, stop_grace_secs: 4}]"
SLEEPS = "[{engine: simulator, gpus: 1, replicas: 2, sleep: true, stop_grace_secs: 4}]"
THREE = GpuInventory(tuple(Gpu(device=str(n), uuid=f"GPU-{n}") for n in range(3)))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A manager of three cards."""
    world = World(tmp_path)
    world.cards = Cards(GpuLeases(THREE), Log(world.stream))
    yield world
    await world.close()


def states(world: World) -> dict[str, str]:
    assert world.manager is not None
    return {r.replica_id: r.state.value for r in world.manager.feed.snapshot.replicas}


def reclaims(world: World) -> Reclaims:
    assert world.manager is not None
    return world.manager.reclaims


async def test_a_card_that_goes_is_left_once_a_stand_in_serves(world: World) -> None:
    await world.start(configuration(world.run_dir, POOL))
    world.fetch.busy(1, 0)
    reclaims(world).take(30.0, ["0"], "test")
    await world.clock.advance(0.1)
    stand_in = world.provider.spawned[2]
    assert stand_in.env["CUDA_VISIBLE_DEVICES"] == "2"
    await world.clock.advance(0.5)
    assert states(world) == {"m-0": "draining", "m-1": "ready", "m-2": "ready"}
    world.fetch.busy(0, 0)
    await world.clock.advance(2.0)
    first = world.provider.spawned[0]
    assert first.signals == [15]
    first.exit("exited with status 0")
    await world.clock.advance(60.0)
    assert states(world) == {"m-1": "ready", "m-2": "ready"}
    assert len(world.provider.spawned) == 3


async def test_without_a_card_elsewhere_it_drains_in_time_and_is_ended_in_time(
    world: World,
) -> None:
    await world.start(configuration(world.run_dir, POOL))
    world.fetch.busy(1, 0)  # a request that does not end
    reclaims(world).take(20.0, ["0", "2"], "test")
    await world.clock.advance(13.0)
    assert states(world) == {"m-0": "ready", "m-1": "ready", "m-2": "backoff"}
    await world.clock.advance(1.5)
    assert states(world)["m-0"] == "draining"
    await world.clock.advance(3.6)
    assert world.provider.spawned[0].signals == [15]
    await world.clock.advance(1.5)
    assert world.provider.spawned[0].signals == [15, 9]
    world.provider.spawned[0].exit("killed by SIGKILL")
    assert "m-0" in reclaims(world).report().fates
    reclaims(world).cancel()
    assert reclaims(world).report().fates == {}, "what was to become of them is told no more"
    await world.clock.advance(1.0)
    assert states(world) == {"m-1": "ready", "m-2": "ready"}


class Mover(FakeSuspender):
    """Resumes on other cards; the engine is awake again once it is asked to be."""

    def __init__(self, fetch: FakeFetch) -> None:
        super().__init__()
        self.capability = Capability(works=True, moves=True)
        self._fetch = fetch
        fetch.answers["/is_sleeping"] = Answer(200, b'{"is_sleeping": true}')

    @override
    async def resume(self, pid: int, devices: Mapping[str, str] | None = None) -> None:
        await super().resume(pid, devices)
        self._fetch.answers["/is_sleeping"] = Answer(200, b'{"is_sleeping": false}')


async def test_what_can_be_moved_keeps_its_process(world: World) -> None:
    world.suspender = Mover(world.fetch)
    await world.start(configuration(world.run_dir, SLEEPS))
    reclaims(world).take(60.0, ["0"], "test")
    await world.clock.advance(5.0)
    assert states(world) == {"m-0": "ready", "m-1": "ready"}
    assert len(world.provider.spawned) == 2
    assert world.suspender.asked == [
        ("suspend", 4000, None),
        ("resume", 4000, {"GPU-0": "GPU-2"}),
    ]
    assert world.record(0).gpus == ("2",)


async def test_a_manager_after_a_killed_one_goes_on(world: World) -> None:
    await world.start(configuration(world.run_dir, POOL))
    reclaims(world).take(30.0, ["0"], "test")
    await world.clock.advance(3.0)
    first, second, stand_in = world.provider.spawned
    first.exit("exited with status 0")
    await world.clock.advance(1.0)
    assert states(world) == {"m-1": "ready", "m-2": "ready"}
    live = list(world.journal.live.values())
    world.provider.left_behind = dict(
        zip((launch.launch_id for launch in live), (second, stand_in), strict=True)
    )
    before, world.manager = world.manager, None
    assert before is not None
    await before.close()
    world.cards = Cards(GpuLeases(THREE), Log(world.stream))
    await world.start(configuration(world.run_dir, POOL))
    await world.clock.advance(5.0)
    assert states(world) == {"m-1": "ready", "m-2": "ready"}
    assert len(world.provider.spawned) == 3
    assert world.cards.leases is not None
    assert world.cards.leases.withdrawn == {"0"}
    assert reclaims(world).report().notices[0].ends_in_s < 30.0


async def test_of_two_notices_for_the_same_the_earlier_end_holds(world: World) -> None:
    await world.start(configuration(world.run_dir, POOL))
    one = reclaims(world)
    for in_s in (30.0, 40.0, 20.0):
        one.take(in_s, ["0"], "test")
    assert [n.ends_in_s for n in one.report().notices] == [20.0]


async def test_notices_that_mean_nothing_are_refused(world: World) -> None:
    await world.start(configuration(world.run_dir, POOL))
    with pytest.raises(RefusedNoticeError, match="no GPU '7'; there are 0, 1, 2"):
        reclaims(world).take(30.0, ["0", "7"], "test")


async def test_without_leases_only_the_whole_machine_can_go(world: World) -> None:
    world.cards = None
    await world.start(configuration(world.run_dir, POOL))
    with pytest.raises(RefusedNoticeError, match="leases no GPUs"):
        reclaims(world).take(30.0, ["0"], "test")
    reclaims(world).take(30.0, None, "test")
    await world.clock.advance(30.0 - 2.0 - 4.0 - 0.1)
    assert states(world) == {"m-0": "ready", "m-1": "ready"}
    await world.clock.advance(0.2)
    assert states(world) == {"m-0": "draining", "m-1": "draining"}


async def test_a_file_of_another_life_of_the_machine_says_nothing(world: World) -> None:
    (world.run_dir / "reclaim.json").write_text('{"boot_id": "x", "notices": [[1, 2, ["0"]]]}')
    await world.start(configuration(world.run_dir, POOL))
    assert reclaims(world).report().notices == ()


async def test_a_file_that_cannot_be_read_is_told_of(world: World) -> None:
    (world.run_dir / "reclaim.json").write_text("{")
    await world.start(configuration(world.run_dir, POOL))
    assert "reclaim_file" in [event["event"] for event in world.events()]


SCALED = (
    "[{engine: simulator, gpus: 1, target_inputs: 4, stop_grace_secs: 4, "
    "autoscale: {min: 2, max: 3}}]"
)


async def test_a_scaled_pool_keeps_its_size(world: World) -> None:
    await world.start(configuration(world.run_dir, SCALED))
    await world.clock.advance(3.0)
    assert states(world) == {"m-0": "ready", "m-1": "ready"}
    world.fetch.busy(0, 0)
    reclaims(world).take(60.0, ["0"], "test")
    await world.clock.advance(3.5)
    assert world.provider.spawned[0].signals == [15]
    world.provider.spawned[0].exit("exited with status 0")
    for _ in range(60):
        await world.clock.advance(5.0)
        assert states(world) == {"m-1": "ready", "m-2": "ready"}
    assert len(world.provider.spawned) == 3


async def test_offline_work_makes_room_at_once_and_starts_elsewhere(world: World) -> None:
    pools = "[{engine: simulator, gpus: 1, class: offline, stop_grace_secs: 4}]"
    await world.start(configuration(world.run_dir, pools))
    reclaims(world).take(60.0, ["0"], "test")
    await world.clock.advance(2.0)
    assert reclaims(world).report().fates == {"m-0": "is requeued"}
    world.provider.spawned[0].exit("exited with status 0")
    await world.clock.advance(2.0)
    assert states(world) == {"m-0": "ready"}
    assert world.record(0).gpus == ("1",)


async def test_when_all_goes_nobody_is_held_for_a_pool_at_nothing(world: World) -> None:
    scaled = "[{engine: simulator, target_inputs: 4, autoscale: {max: 2}}]"
    manager = await world.start(configuration(world.run_dir, scaled))
    assert [pool.wakes for pool in manager.feed.snapshot.pools] == [True]
    reclaims(world).take(30.0, None, "test")
    await world.clock.advance(0.5)
    assert [pool.wakes for pool in manager.feed.snapshot.pools] == [False]
    reclaims(world).cancel()
    await world.clock.advance(0.5)
    assert [pool.wakes for pool in manager.feed.snapshot.pools] == [True]
