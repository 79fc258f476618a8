"""What a cluster starts, until it is known where it runs, and what is known of it then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from backends.engines.base import UNPLACED
from proxy.config import Config, ManagerConfig
from tests.fakes.world import World, configuration

POOL = "[{engine: simulator, gpus: 2, replicas: 1}]"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.provider.waits = "waits for 2 GPUs"
    world.config = on_ray(configuration(tmp_path, POOL))
    yield world
    await world.close()


def on_ray(config: Config) -> Config:
    manager: ManagerConfig = msgspec.structs.replace(config.manager, provider="ray")
    return msgspec.structs.replace(config, manager=manager)


async def test_what_waits_for_a_machine_says_so_and_nobody_is_asked_in_its_place(
    world: World,
) -> None:
    await world.start()
    await world.clock.advance(5)
    assert world.states() == ["starting"]
    assert world.record().reason == "waits for 2 GPUs"
    assert world.record().url.startswith(f"http://{UNPLACED}:")
    assert world.fetch.asked == []  # though somebody would answer
    (process,) = world.provider.spawned
    assert process.argv[process.argv.index("--host") + 1] == "0.0.0.0"
    (launch,) = world.journal.live.values()
    assert launch.gpus_wanted == 2


async def test_once_placed_it_is_known_by_the_address_of_its_machine(world: World) -> None:
    await world.start()
    (process,) = world.provider.spawned
    assert process.placed is not None
    process.placed.set_result("10.0.0.7")
    await world.clock.advance(1)
    assert world.states() == ["ready"]
    record = world.record()
    assert record.url == f"http://10.0.0.7:{process.port}"
    assert record.kv_events.startswith("tcp://10.0.0.7:")
    assert record.kv_replay.startswith("tcp://10.0.0.7:")
    (launch,) = world.journal.live.values()  # for the manager after this one
    assert launch.host == "10.0.0.7"
    assert launch.kv_source == (record.kv_events, record.kv_replay, record.kv_topic)


async def test_one_that_ends_before_it_had_a_machine_is_started_again(world: World) -> None:
    await world.start()
    (process,) = world.provider.spawned
    assert process.placed is not None
    process.placed.cancel()
    process.exit("no room")
    await world.clock.advance(0.5)
    assert world.record().reason.startswith("no room before it was ready")
    await world.clock.advance(5)
    assert len(world.provider.spawned) == 2
    assert world.provider.spawned[1].port != process.port
