"""Replicas that start from an image, that are made into one, and all that fails on the way."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from backends import images
from backends.cards import Cards
from backends.engines.simulator import Simulator
from backends.fetch import Answer, Silence
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.images import host_words, key_of
from backends.journal import Staged
from backends.keeper import Keeper
from backends.ladder import Rung
from backends.lifecycle import Phase
from backends.log import Log
from backends.snapshots.base import Capability, SnapshotError, SuspendError
from tests.fakes.provider import FakeProcess
from tests.fakes.snapshots import CELL, COPY
from tests.fakes.specs import replica_specs
from tests.fakes.world import World, configuration

PLAIN = "[{engine: simulator, snapshot: true, args: [--dialect, sglang]}]"
SLEEPY = "[{engine: simulator, snapshot: true, sleep: true, args: [--dialect, sglang]}]"
CARD = "[{engine: simulator, snapshot: true, gpus: 1, args: [--dialect, sglang]}]"
SLEPT = ["/pause_generation", "/flush_cache?timeout=10", "/release_memory_occupation"]
LOOKS_MAX = 400


class OnCards(Simulator):
    """The simulator, if it held memory of a card."""

    uses_gpu = True


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    reread = Answer(200, b'{"success": true}')
    world.fetch.answers |= {"/ready": Answer(200), "POST /update_weights_from_disk": reread}
    yield world
    await world.close()


def keeper(world: World) -> Keeper:
    assert world.manager is not None
    return world.manager.keepers["m-0"]


def posted(world: World) -> list[str]:
    return ["/" + url.split("/", 3)[3] for url in world.fetch.posted]


def signals(world: World, index: int = 0) -> list[int]:
    """Return what one that was spawned has been sent; nothing, when it has not been yet."""
    return [number for one in world.provider.spawned[index : index + 1] for number in one.signals]


async def until(world: World, look: Callable[[], bool]) -> None:
    """Let threads end and a little time pass, until it is so."""
    for _ in range(LOOKS_MAX):
        if look():
            return
        await asyncio.sleep(0.002)  # the looks into /proc and the model's folder are a thread's
        await world.clock.advance(0.1)
    raise AssertionError(f"{keeper(world).state}; {world.snapshots.asked}; {world.events()[-3:]}")


async def ready(world: World, pools: str = PLAIN) -> Keeper:
    await world.start(configuration(world.run_dir, pools))
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    await world.clock.advance(0.1)
    return keeper(world)


async def started_anew(world: World) -> None:
    """Have the process die and the next one be ready."""
    process = world.provider.spawned[-1]
    process.exit("exited with status 1")
    count = len(world.provider.spawned)
    await until(world, lambda: len(world.provider.spawned) > count)
    await until(world, lambda: keeper(world).state.phase is Phase.READY)


async def test_the_first_start_makes_an_image_before_it_serves(world: World) -> None:
    world.snapshots.free.clear()
    await world.start(configuration(world.run_dir, PLAIN))
    await until(world, lambda: "create" in world.snapshots.asked)
    await world.clock.advance(0.1)
    record = world.record()
    assert world.provider.spawned[0].argv[:2] == ("cell", "run")
    assert "0.0.0.0" in world.provider.spawned[0].argv
    assert (record.state.value, record.reason) == ("starting", "an image of it is made")
    count = len(images.WARM_UP_WORDS)
    assert posted(world) == ["/v1/completions"] * count + SLEPT, "it is as small as it gets"
    lengths = [len(body) for body in world.fetch.bodies[:count]]
    assert lengths == sorted(set(lengths)), "several lengths"
    assert record.url in world.fetch.dropped
    (launch,) = world.journal.live.values()
    assert (launch.staged, launch.ready) == (True, False)
    await world.clock.advance(5.0)
    world.snapshots.free.set()
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    await world.clock.advance(0.2)
    assert (world.states(), world.record().url) == (["ready"], f"http://{CELL}:8000")
    assert world.record().kv_events == f"tcp://{CELL}:8001"
    assert world.snapshots.states == [(False, 2, ())]
    (launch,) = world.journal.live.values()
    assert (launch.staged, launch.ready, launch.host) == (False, True, CELL)
    turns = keeper(world).turns
    assert set(turns) == {Rung.COLD, Rung.SNAPSHOTTED}, "its moment of sleep says nothing of sleep"
    assert turns[Rung.COLD].up_s < 1.0
    assert turns[Rung.SNAPSHOTTED].down_s >= 5.0


async def test_the_next_start_is_a_copy(world: World) -> None:
    kept = await ready(world)
    assert world.snapshots.asked == ["find", "enclose", "create"]
    world.fetch.posted.clear()
    world.snapshots.free.clear()
    world.provider.spawned[0].exit("exited with status 1")
    await until(world, lambda: "restored" in world.snapshots.asked)
    await world.clock.advance(3.0)
    world.snapshots.free.set()
    await until(world, lambda: kept.state.phase is Phase.READY)
    await world.clock.advance(0.2)
    assert world.snapshots.asked[3:] == ["find", "restore", "restored"]
    assert world.provider.spawned[1].argv == ("cell", "restore", "image-1")
    assert "/v1/completions" not in posted(world), "what was warmed up is warm"
    record = world.record()
    assert (record.url, record.asleep) == (f"http://{COPY}:8000", False)
    assert record.reason.startswith("restored, after ")
    assert 3.0 <= kept.turns[Rung.SNAPSHOTTED].up_s < 6.0
    (launch,) = world.journal.live.values()
    assert (launch.staged, launch.ready) == (False, True)


async def test_a_copy_is_woken_as_its_original_slept(world: World) -> None:
    await ready(world, SLEEPY)
    assert world.snapshots.states == [(False, 2, ())]
    read_again = ["/resume_memory_occupation", "/update_weights_from_disk", "/continue_generation"]
    assert posted(world)[-3:] == read_again
    world.fetch.posted.clear()
    await started_anew(world)
    assert posted(world) == read_again
    (launch,) = world.journal.live.values()
    assert (launch.nap_level, launch.turning) == (None, False)


async def test_what_holds_a_card_is_suspended_for_its_image_and_keeps_its_lease(
    world: World,
) -> None:
    gpus = tuple(Gpu(device=str(n), uuid=f"GPU-{n}", name="H") for n in range(2))
    world.cards = Cards(GpuLeases(GpuInventory(gpus)), Log(world.stream))
    world.engines = {"simulator": OnCards()}
    kept = await ready(world, CARD)
    assert world.suspender.words == ["suspend", "resume"]
    assert world.snapshots.states == [(True, 2, ("GPU-0",))]
    assert world.snapshots.image is not None
    assert world.snapshots.image.key.gpu == "H"
    assert world.record().gpus == ("0",)
    assert world.cards._leases is not None
    world.provider.spawned[0].exit("exited with status 1")
    await world.clock.advance(0.1)
    world.cards._leases.claim("m-0", ["1"])  # the copy is to run on the other card
    await until(world, lambda: kept.state.phase is Phase.READY)
    assert world.suspender.asked[-1][0] == "resume"
    assert world.suspender.asked[-1][2] == {"GPU-0": "GPU-1"}
    await world.clock.advance(0.2)
    assert world.record().gpus == ("1",)


RESTORES = [
    ("it says no", "restored", SnapshotError("a page is damaged")),
    ("it cannot be begun", "restore", SnapshotError("no CRIU")),
]


@pytest.mark.parametrize(
    ("where", "error"), [r[1:] for r in RESTORES], ids=[r[0] for r in RESTORES]
)
async def test_a_restore_that_fails_is_followed_by_a_cold_start_at_once(
    world: World, where: str, error: Exception
) -> None:
    await ready(world)
    world.snapshots.failures[where] = error
    world.provider.spawned[0].exit("exited with status 1")
    if where == "restored":
        await until(world, lambda: len(world.provider.spawned) == 2)
        await until(world, lambda: signal.SIGKILL in signals(world, 1))
        assert "a page is damaged" in keeper(world).state.reason
        now_s = world.clock.now_s()
        world.provider.spawned[1].exit("killed by SIGKILL")
        await until(world, lambda: len(world.provider.spawned) == 3)
        assert world.clock.now_s() - now_s < 2.0, "there was no back-off"
    await until(world, lambda: world.provider.spawned[-1].argv[:2] == ("cell", "run"))
    await until(world, lambda: world.snapshots.asked.count("create") == 2)
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    assert world.snapshots.image is not None
    assert world.snapshots.image.snapshot_id == "image-2", "and another one was made"


async def test_a_copy_that_dies_before_it_serves_is_followed_by_a_cold_start_at_once(
    world: World,
) -> None:
    await ready(world)
    world.snapshots.free.clear()
    world.provider.spawned[0].exit("exited with status 1")
    await until(world, lambda: len(world.provider.spawned) == 2)
    world.provider.spawned[1].exit("exited with status 70")
    world.snapshots.free.set()
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    assert world.provider.spawned[2].argv[:2] == ("cell", "run")
    assert keeper(world).state.failures <= 1, "only the first death was a fault"


DUMPS = [
    ("it runs on", SnapshotError("No space left on device", running=True), True),
    ("it was lost", SnapshotError("the cell is gone"), False),
]


@pytest.mark.parametrize(("error", "serves"), [d[1:] for d in DUMPS], ids=[d[0] for d in DUMPS])
async def test_a_dump_that_fails_costs_no_replica(
    world: World, error: Exception, serves: bool
) -> None:
    world.snapshots.failures["create"] = error
    await world.start(configuration(world.run_dir, SLEEPY))
    if not serves:
        await until(world, lambda: signal.SIGKILL in signals(world))
        assert "lost to its image: the cell is gone" in keeper(world).state.reason
        world.provider.spawned[0].exit("killed by SIGKILL")
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    assert world.snapshots.asked.count("create") == 1, "it is not tried again soon"
    assert Rung.SNAPSHOTTED in keeper(world).observed.out
    assert "/resume_memory_occupation" in posted(world) or not serves
    assert any(event["event"] == "no_image" for event in world.events())


async def test_a_replica_that_would_not_rest_for_its_image_serves_without(world: World) -> None:
    world.fetch.answers["POST /flush_cache?timeout=10"] = Answer(400, b"busy\n")
    await ready(world, SLEEPY)
    assert "create" not in world.snapshots.asked
    (launch,) = world.journal.live.values()
    assert (launch.staged, launch.turning) == (False, False)


async def test_a_suspension_that_fails_for_an_image_leaves_a_replica_that_serves(
    world: World,
) -> None:
    gpus = (Gpu(device="0", uuid="GPU-0", name="H"),)
    world.cards = Cards(GpuLeases(GpuInventory(gpus)), Log(world.stream))
    world.engines = {"simulator": OnCards()}
    world.suspender.failure = SuspendError("no memory on the host", intact=True)
    await ready(world, CARD)
    assert "create" not in world.snapshots.asked


async def test_one_that_broke_for_its_image_is_started_anew(world: World) -> None:
    world.fetch.answers["POST /release_memory_occupation"] = Answer(0, silence=Silence.TIMEOUT)
    await world.start(configuration(world.run_dir, SLEEPY))
    await until(world, lambda: signal.SIGKILL in signals(world))
    world.provider.spawned[0].exit("killed by SIGKILL")
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    assert "create" not in world.snapshots.asked


async def test_one_that_dies_in_its_warm_up_is_started_without_one(world: World) -> None:
    world.fetch.answering.clear()
    await world.start(configuration(world.run_dir, PLAIN))
    await until(world, lambda: posted(world) == ["/v1/completions"])
    world.provider.spawned[0].exit("exited with status 1")
    world.fetch.answering.set()
    await until(world, lambda: len(world.provider.spawned) == 2)
    await until(world, lambda: keeper(world).state.phase is Phase.READY)
    assert "create" not in world.snapshots.asked
    assert posted(world) == ["/v1/completions"]


async def test_one_that_never_becomes_ready_is_ended_as_ever(world: World) -> None:
    world.fetch.answers["/ready"] = Answer(503)
    pools = PLAIN.replace("snapshot", "start_timeout_secs: 5, snapshot")
    await world.start(configuration(world.run_dir, pools))
    await until(world, lambda: signal.SIGTERM in signals(world))
    assert keeper(world).state.reason == "not ready after 5 s"
    assert "create" not in world.snapshots.asked


async def test_a_copy_that_does_not_wake_is_ended_and_its_image_discarded(world: World) -> None:
    await ready(world)
    world.fetch.answers["/ready"] = Answer(503)
    world.provider.spawned[0].exit("exited with status 1")
    await until(world, lambda: signal.SIGKILL in signals(world, 1))
    world.provider.spawned[1].exit("killed by SIGKILL")
    await until(world, lambda: len(world.provider.spawned) == 3)
    assert world.provider.spawned[2].argv[:2] == ("cell", "run")


async def test_a_dump_without_end_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CREATE_S_MAX", 0.0)
    world.snapshots.free.clear()
    await world.start(configuration(world.run_dir, PLAIN))
    await until(world, lambda: signal.SIGKILL in signals(world))
    assert "no end after 0 s" in keeper(world).state.reason


async def test_one_image_is_made_at_a_time(world: World) -> None:
    world.snapshots.free.clear()
    await world.start(
        configuration(world.run_dir, PLAIN.replace("snapshot", "replicas: 2, snapshot"))
    )
    await until(world, lambda: sorted(world.states()) == ["ready", "starting"])
    await world.clock.advance(1.0)
    assert world.snapshots.asked.count("create") == 1


async def test_where_no_cell_can_be_made_it_starts_without(world: World) -> None:
    world.snapshots.failures["enclose"] = SnapshotError("no iproute2")
    await ready(world)
    assert world.provider.spawned[0].argv[0] != "cell"
    assert world.record().url.startswith("http://127.0.0.1:")
    assert "create" not in world.snapshots.asked


async def test_where_snapshots_do_not_work_nothing_is_asked_for(world: World) -> None:
    world.snapshots.capability = Capability(works=False, reason="no CRIU")
    await ready(world)
    assert world.snapshots.asked == []
    assert world.record().url.startswith("http://127.0.0.1:")


async def test_warm_up_that_is_refused_is_done_without(world: World) -> None:
    """An engine that embeds has no completions."""
    world.fetch.answers["POST /v1/completions"] = Answer(404)
    await ready(world)
    assert world.snapshots.asked == ["find", "enclose", "create"]


async def test_what_a_manager_died_in_is_started_anew_by_the_next(world: World) -> None:
    await ready(world)
    (launch,) = world.journal.live.values()
    ready_once = msgspec.structs.replace(launch, ready=False)
    world.journal.append(ready_once)
    world.journal.append(Staged(launch.launch_id, staged=True))
    process = FakeProcess(4000, (), {})
    world.provider.left_behind[launch.launch_id] = process
    assert world.manager is not None
    await world.manager.close()
    await world.start(configuration(world.run_dir, PLAIN))
    assert process.signals == [signal.SIGKILL], "a stopped one would not hear of a SIGTERM"
    assert "an image was restored or made" in keeper(world).state.reason


async def test_a_cell_is_adopted_at_its_own_address(world: World) -> None:
    await ready(world)
    (launch,) = world.journal.live.values()
    world.provider.left_behind[launch.launch_id] = FakeProcess(4000, (), {})
    assert world.manager is not None
    await world.manager.close()
    await world.start(configuration(world.run_dir, PLAIN))
    assert (world.states(), world.record().url) == (["ready"], f"http://{CELL}:8000")


async def test_a_manager_knows_of_images_before_any_start(world: World) -> None:
    """What bringing up one more takes is what proxies tell clients, and what the law counts on."""
    scaled = PLAIN.replace("snapshot", "target_inputs: 4, autoscale: {min: 0, max: 2}, snapshot")
    assert world.manager is None
    manager = await world.start(configuration(world.run_dir, scaled))
    assert manager.feed.snapshot.pools[0].start_s == 1.0, "a cold start's"
    await manager.close()
    (spec,) = replica_specs(configuration(world.run_dir, PLAIN))
    key = key_of(Simulator(), spec, "0.30.0", "H")
    await world.snapshots.create(1, key, 8000, lambda *_: None)
    manager = await world.start(configuration(world.run_dir, scaled))
    assert world.provider.spawned == []
    assert manager.feed.snapshot.pools[0].start_s == 0.5, "a restored copy's"
    changed = scaled.replace("sglang", "vllm")
    manager.reload(configuration(world.run_dir, changed))
    await world.clock.advance(0.5)
    assert manager.feed.snapshot.pools[0].start_s == 1.0, "that image is of another command"


async def test_what_is_found_bad_is_no_pools_image_any_more(world: World) -> None:
    kept = await ready(world)
    assert kept._around.shelf.has("m")
    world.snapshots.failures["restored"] = SnapshotError("a page is damaged")
    world.provider.spawned[0].exit("exited with status 1")
    await until(world, lambda: signal.SIGKILL in signals(world, 1))
    assert kept._around.shelf.has("m"), "until its process has ended"
    world.provider.spawned[1].exit("killed by SIGKILL")
    await until(world, lambda: "discard" in world.snapshots.asked)  # nor anybody's after it
    (found,) = [*kept._around.shelf._images.values()] or [None]  # another one, if it is made yet
    assert found is None or found.snapshot_id != "image-1"


# --- which image fits -----------------------------------------------------------------------------


def test_a_key_names_command_adapters_and_the_files_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"1")
    pool = f"[{{engine: simulator, model_path: '{tmp_path}/model'}}]"
    (spec,) = replica_specs(configuration(tmp_path, pool))
    engine = Simulator()

    def key(*, args: tuple[str, ...] = (), adapters: dict[str, str] | None = None) -> str:
        changed = msgspec.structs.replace(spec, args=args, adapters=adapters or {})
        return key_of(engine, changed, "0.30.0", "H").launch_hash

    plain = key()
    assert key() == plain
    assert len({plain, key(args=("--x",)), key(adapters={"a": "/a"})}) == 3
    weights.write_bytes(b"12")
    assert key() != plain


def test_the_host_is_named_by_kernel_and_processor(tmp_path: Path) -> None:
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("processor : 0\nmodel name\t: Xeon\nflags\t\t: fpu sse\n")
    first = host_words(cpu)
    assert "Xeon" in first
    cpu.write_text("processor : 0\nmodel name\t: Xeon\nflags\t\t: fpu sse avx512f\n")
    assert host_words(cpu) != first
    assert host_words(tmp_path / "none")
