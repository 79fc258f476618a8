"""Images of replicas that serve already: wished by an operator, or owed since their start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from backends.exposition import Declared
from backends.fetch import Answer
from backends.ladder import Rung
from backends.lifecycle import Event, Phase
from backends.metric_lists import MANAGER, MANAGER_PREFIX
from backends.snapshots.base import Capability, Progress, SnapshotError
from backends.turns import RefusedError
from tests.backends.test_images import PLAIN, keeper, posted, ready, started_anew, until
from tests.fakes.provider import METRICS, FakeProcess
from tests.fakes.world import World, configuration

IDLE = Answer(200, METRICS.format(running=0, waiting=0).encode())
BUSY = Answer(200, METRICS.format(running=1, waiting=0).encode())
WINDOWS = "stable_window_secs: 10, panic_window_secs: 2, scaledown_window_secs: 5"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    reread = Answer(200, b'{"success": true}')
    world.fetch.answers |= {"/ready": Answer(200), "POST /update_weights_from_disk": reread}
    world.fetch.answers["/metrics"] = IDLE
    yield world
    await world.close()


def risen(world: World) -> float:
    """Return how many replicas have come up, by the metrics."""
    assert world.manager is not None
    declared = Declared(MANAGER_PREFIX, MANAGER)
    tally = world.manager.scaler.tally.collect(declared)
    samples = [s for family in tally for s in family.samples]
    counts = [sample.value for sample in samples if sample.name.endswith("_count")]
    assert counts
    return sum(counts)


async def test_one_that_serves_is_drained_dumped_and_serves_on(world: World) -> None:
    kept = await ready(world)
    turns = dict(kept.turns)
    world.fetch.posted.clear()
    world.snapshots.free.clear()
    kept.pose("an operator's wish")
    await world.clock.advance(0.1)
    assert (kept.state.phase, world.states()) == (Phase.EMPTYING, ["draining"])
    assert kept.images.progress == Progress("draining")
    await until(world, lambda: world.snapshots.asked.count("create") == 2)
    assert (kept.state.phase, kept.images.progress) == (
        Phase.FALLING_ASLEEP,
        Progress("dumping", 0.5),
    )
    (launch,) = world.journal.live.values()
    assert (launch.staged, launch.ready) == (True, True)
    world.snapshots.free.set()
    await until(world, lambda: kept.state.phase is Phase.READY)
    assert kept.state.reason == "image image-2 was made of it, 0 MiB"
    assert kept.images.progress == Progress(snapshot="image-2", image_bytes=100)
    assert "/resume_memory_occupation" in posted(world)
    (launch,) = world.journal.live.values()
    assert (launch.staged, launch.turning) == (False, False)
    assert kept.turns[Rung.COLD] == turns[Rung.COLD]
    assert (kept.observed.aim, kept.observed.posing, len(world.provider.spawned)) == (
        *(Rung.AWAKE, False),
        1,
    )
    await started_anew(world)
    assert world.provider.spawned[1].argv == ("cell", "restore", "image-2")


async def test_one_that_is_held_stays_held(world: World) -> None:
    kept = await ready(world)
    kept.apply(Event.HOLD)
    kept.pose("an operator's wish")
    await until(world, lambda: kept.images.progress.snapshot == "image-2")
    await until(world, lambda: kept.state.phase is Phase.HELD)


async def test_requests_that_do_not_end_in_time_are_kept(world: World) -> None:
    """To sleep it would be told all the same; an image is not worth a request."""
    kept = await ready(world)
    world.fetch.answers["/metrics"] = BUSY
    await world.clock.advance(1.0)
    world.fetch.posted.clear()
    kept.pose("an operator's wish")
    await until(world, lambda: kept.state.phase is Phase.READY)
    assert kept.state.reason == "no image was made of it: its requests did not end in time"
    assert world.fetch.posted == []
    kept.pose("an operator's wish")
    kept.raise_("called back")
    assert kept.state.phase is Phase.READY
    assert kept.images.progress.problem == "it was ready before that"


async def test_a_dump_that_fails_is_told_and_it_serves_on(world: World) -> None:
    kept = await ready(world)
    world.snapshots.failures["create"] = SnapshotError("No space left on device", running=True)
    kept.pose("an operator's wish")
    await until(world, lambda: kept.state.phase is Phase.READY)
    assert kept.images.progress.problem == "No space left on device"
    assert kept.state.reason.endswith("No space left on device")


async def test_what_cannot_be_made_into_one_says_why(world: World) -> None:
    kept = await ready(world)
    kept.apply(Event.SLEEP)
    with pytest.raises(RefusedError, match="it is going to sleep; only what is ready"):
        kept.pose("")
    kept.raise_("")
    kept._around.shelf.making = True
    with pytest.raises(RefusedError, match="an image of another replica is being made"):
        kept.pose("")
    kept._around.shelf.making = False
    kept.pose("")
    with pytest.raises(RefusedError, match="an image of it is being made"):
        kept.lower(Rung.ASLEEP, "")
    await until(world, lambda: kept.state.phase is Phase.READY)
    kept._spec_hash = "of another command"
    with pytest.raises(RefusedError, match="restart it first"):
        kept.pose("")


async def test_without_a_cell_there_is_no_image(world: World) -> None:
    world.snapshots.capability = Capability(works=False, reason="no CRIU")
    kept = await ready(world)
    with pytest.raises(RefusedError, match=r"does not run in a cell.*\(no CRIU\)"):
        kept.pose("")


@pytest.mark.parametrize("same", [True, False], ids=["as it was", "another model by now"])
async def test_one_of_the_manager_before_is_made_into_one_if_it_is_what_it_was(
    world: World, same: bool
) -> None:
    await ready(world)
    (launch,) = world.journal.live.values()
    assert launch.image_of
    if not same:
        world.journal.append(msgspec.structs.replace(launch, image_of="what it was"))
    world.provider.left_behind[launch.launch_id] = FakeProcess(4000, (), {})
    assert world.manager is not None
    await world.manager.close()
    await world.start(configuration(world.run_dir, PLAIN))
    kept = keeper(world)
    await world.clock.advance(1.0)
    kept.pose("an operator's wish")
    await until(world, lambda: kept.state.phase is Phase.READY)
    if same:
        assert kept.images.progress.snapshot == "image-2"
    else:
        assert "is not what it was started with" in kept.state.reason
    world.snapshots.failures["restore"] = world.snapshots.failures["enclose"] = SnapshotError("no")
    world.provider.left_behind[launch.launch_id].exit("exited with status 1")
    await until(world, lambda: len(world.provider.spawned) == 2)
    await until(world, lambda: kept.state.phase is Phase.READY)
    with pytest.raises(RefusedError, match="does not run in a cell"):
        kept.pose("its successor is another life")


async def test_one_whose_image_had_to_wait_makes_it_once_it_has_nothing_to_do(
    world: World,
) -> None:
    """Another pool's dump was under way when it came up."""
    pools = "[{engine: simulator, snapshot: true, args: [--dialect, sglang]}, "
    pools += "{engine: simulator, snapshot: true, args: [--dialect, sglang], name: other}]"
    world.snapshots.free.clear()
    await world.start(configuration(world.run_dir, pools))
    await until(world, lambda: sorted(world.states()) == ["ready", "starting"])
    assert world.manager is not None
    late = next(k for k in world.manager.keepers.values() if k.state.phase is Phase.READY)
    await world.clock.advance(20.0)
    assert world.snapshots.asked.count("create") == 1
    world.fetch.answers["/metrics"] = BUSY
    await world.clock.advance(1.0)
    world.snapshots.free.set()
    await until(world, lambda: world.states() == ["ready", "ready"])
    await world.clock.advance(20.0)
    assert world.snapshots.asked.count("create") == 1, "it has requests"
    assert late.state.phase is Phase.READY, "and is not drained for this"
    world.fetch.answers["/metrics"] = IDLE
    await until(world, lambda: bool(late.images.progress.snapshot))
    await until(world, lambda: late.state.phase is Phase.READY)
    await world.clock.advance(20.0)
    assert world.snapshots.asked.count("create") == 2


async def test_a_scaled_pool_counts_it_as_one_that_comes(world: World) -> None:
    scale = f"target_inputs: 4, autoscale: {{min: 1, max: 3, {WINDOWS}}}, snapshot"
    kept = await ready(world, PLAIN.replace("snapshot", scale))
    assert world.manager is not None
    world.snapshots.free.clear()
    rises = risen(world)
    kept.pose("an operator's wish")
    await until(world, lambda: world.snapshots.asked.count("create") == 2)
    await world.clock.advance(5.0)
    (pool,) = world.manager.feed.snapshot.pools
    assert (pool.awake, pool.coming) == (0, 1)
    world.snapshots.free.set()
    await until(world, lambda: kept.state.phase is Phase.READY)
    await world.clock.advance(3.0)
    assert len(world.provider.spawned) == 1, "and none is started in its place"
    assert not [e for e in world.events() if e["event"] == "refused"], "nor is it called back"
    assert risen(world) == rises, "it has not come up from anywhere"
