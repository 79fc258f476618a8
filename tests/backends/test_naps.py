"""Replicas that are put to sleep and woken, that would not, and whose manager dies meanwhile."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.fetch import Answer, Silence
from backends.journal import Nap
from backends.keeper import Keeper
from backends.ladder import Rung
from backends.lifecycle import Event, Phase
from backends.turns import RefusedError
from tests.fakes.provider import FakeProcess
from tests.fakes.world import World, configuration

VLLM = "[{engine: simulator, sleep: true, stop_grace_secs: 20}]"
SGLANG = "[{engine: simulator, sleep: true, args: [--dialect, sglang]}]"
DRAINED_S = 1.0
ASLEEP, AWAKE = Answer(200, b'{"is_sleeping": true}'), Answer(200, b'{"is_sleeping": false}')


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.fetch.answers |= {"/is_sleeping": ASLEEP, "/ready": Answer(200)}
    yield world
    await world.close()


def keeper(world: World) -> Keeper:
    assert world.manager is not None
    return world.manager.keepers["m-0"]


def posted(world: World) -> list[str]:
    return ["/" + url.split("/", 3)[3] for url in world.fetch.posted]


async def asleep(world: World, pools: str = VLLM) -> Keeper:
    """Return the keeper of a replica that sleeps."""
    await world.start(configuration(world.run_dir, pools))
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(DRAINED_S)
    assert keeper(world).state.phase is Phase.ASLEEP
    return keeper(world)


async def test_it_is_drained_then_told_and_published_asleep(world: World) -> None:
    await world.start(configuration(world.run_dir, VLLM))
    world.fetch.busy(1, 0)
    await world.clock.advance(1.5)
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(5.0)
    assert (world.states(), posted(world)) == (["draining"], []), "its request may finish"
    world.fetch.busy(0, 0)
    await world.clock.advance(DRAINED_S)
    record = world.record()
    assert posted(world) == ["/sleep?level=1&mode=wait"]
    assert (record.state.value, record.asleep, record.load) == ("ready", True, None)
    assert record.reason.startswith("asleep at level 1, after ")


async def test_what_does_not_drain_is_told_when_its_time_is_over(world: World) -> None:
    world.fetch.busy(1, 0)
    await world.start(configuration(world.run_dir, VLLM))
    keeper(world).lower(Rung.ASLEEP, "test", 2)
    await world.clock.advance(19.0)
    assert posted(world) == []
    await world.clock.advance(2.0)
    assert posted(world) == ["/sleep?level=2&mode=wait"]


async def test_it_wakes_and_is_published_once_it_answers(world: World) -> None:
    kept = await asleep(world)
    world.fetch.answers |= {"/is_sleeping": AWAKE, "/health": Answer(503)}
    kept.raise_("test")
    await world.clock.advance(2.0)
    assert (kept.state.phase, world.record().asleep) == (Phase.WAKING, True)
    assert posted(world)[-1] == "/wake_up"
    world.fetch.answers["/health"] = Answer(200)
    await world.clock.advance(2.0)
    record = world.record()
    assert (record.state.value, record.asleep) == ("ready", False)
    assert record.reason.startswith("awake, after ")
    (launch,) = world.journal.live.values()
    assert (launch.nap_level, launch.turning) == (None, False)


async def test_sglang_is_told_in_its_own_order(world: World) -> None:
    kept = await asleep(world, SGLANG)
    assert posted(world) == [
        "/pause_generation", "/flush_cache?timeout=10", "/release_memory_occupation",
    ]  # fmt: skip
    kept.raise_("test")
    await world.clock.advance(2.0)
    assert posted(world)[3:] == ["/resume_memory_occupation", "/continue_generation"]
    assert world.states() == ["ready"]
    assert not world.record().asleep


async def test_asleep_it_is_asked_nothing_but_whether_it_is_there(world: World) -> None:
    kept = await asleep(world, SGLANG)
    del world.fetch.asked[:]
    await world.clock.advance(10.0)
    assert set(world.fetch.asked) == {"/ready"}
    world.fetch.silence = Silence.TIMEOUT
    await world.clock.advance(310.0)
    assert kept.state.phase is Phase.STOPPING
    assert world.provider.spawned[0].signals == [signal.SIGTERM]


async def test_one_that_would_not_sleep_serves_on(world: World) -> None:
    """SGLang that is busy after all: nothing has been let go of, so nothing is resumed."""
    world.fetch.answers["POST /flush_cache?timeout=10"] = Answer(400, b"busy\n")
    await world.start(configuration(world.run_dir, SGLANG))
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(DRAINED_S)
    assert posted(world) == [
        "/pause_generation", "/flush_cache?timeout=10", "/continue_generation",
    ]  # fmt: skip
    record = world.record()
    assert (record.state.value, record.asleep) == ("ready", False)
    assert "/flush_cache" in record.reason
    assert record.reason.endswith("answered 400: busy")
    (launch,) = world.journal.live.values()
    assert (launch.nap_level, launch.turning) == (None, False)


async def test_one_that_would_neither_sleep_nor_serve_again_is_started_anew(world: World) -> None:
    world.fetch.answers["POST /flush_cache?timeout=10"] = Answer(400, b"busy\n")
    world.fetch.answers["POST /continue_generation"] = Answer(500)
    await world.start(configuration(world.run_dir, SGLANG))
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(DRAINED_S)
    assert world.provider.spawned[0].signals == [signal.SIGTERM]
    assert "nor serve again: POST /continue_generation" in world.record().reason


async def test_one_that_broke_half_way_is_started_anew(world: World) -> None:
    world.fetch.answers["POST /release_memory_occupation"] = Answer(0, silence=Silence.TIMEOUT)
    await world.start(configuration(world.run_dir, SGLANG))
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(DRAINED_S)
    process = world.provider.spawned[0]
    assert process.signals == [signal.SIGTERM]
    assert "/resume_memory_occupation" not in posted(world)
    assert "it broke while it fell asleep" in world.record().reason
    process.exit("exited")
    await world.clock.advance(5.0)
    assert (world.states(), world.record().restarts) == (["ready"], 1)


async def test_one_that_says_it_is_awake_after_all_does_not_count_as_asleep(world: World) -> None:
    world.fetch.answers["/is_sleeping"] = AWAKE
    await world.start(configuration(world.run_dir, VLLM))
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(DRAINED_S)
    assert posted(world) == ["/sleep?level=1&mode=wait", "/wake_up"]
    assert (world.states(), world.record().asleep) == (["ready"], False)


async def test_one_that_would_not_wake_is_started_anew(world: World) -> None:
    kept = await asleep(world)
    world.fetch.answers["POST /wake_up"] = Answer(500, b"CUDA out of memory")
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert world.provider.spawned[0].signals == [signal.SIGTERM]
    assert world.record().reason.endswith("answered 500: CUDA out of memory")


async def test_a_stop_needs_no_waking(world: World) -> None:
    await asleep(world)
    assert world.manager is not None
    world.manager.reload(configuration(world.run_dir, "[{engine: simulator, replicas: 0}]"))
    await world.clock.advance(0.1)
    process = world.provider.spawned[0]
    assert process.signals == [signal.SIGTERM]
    assert "/wake_up" not in posted(world)
    process.exit("exited")
    await world.clock.advance(0.2)
    assert world.manager.feed.snapshot.replicas == ()


async def test_a_stop_on_the_way_to_sleep_ends_the_calls(world: World) -> None:
    await world.start(configuration(world.run_dir, SGLANG))
    kept = keeper(world)
    kept.lower(Rung.ASLEEP, "test", 1)
    kept.apply(Event.IDLE)
    assert kept.state.phase is Phase.FALLING_ASLEEP
    kept.apply(Event.STOP)
    await world.clock.advance(0.1)
    assert "/release_memory_occupation" not in posted(world)
    assert kept.state.phase is Phase.STOPPING


async def test_on_the_way_to_sleep_and_in_backoff_it_is_called_so(world: World) -> None:
    await world.start(configuration(world.run_dir, VLLM))
    kept = keeper(world)
    kept.lower(Rung.ASLEEP, "test", 1)
    assert kept.record().reason == "test"
    kept.apply(Event.STOP)
    kept.apply(Event.EXITED)
    world.provider.failure = OSError("no more processes")
    kept.apply(Event.START)
    with pytest.raises(RefusedError, match=r"^it is in backoff; only what is ready"):
        kept.lower(Rung.ASLEEP, "test", 1)


async def test_a_death_asleep_is_followed_by_a_start_awake(world: World) -> None:
    await asleep(world)
    world.provider.spawned[0].exit("killed by SIGKILL")
    await world.clock.advance(0.1)
    assert (world.states(), world.record().asleep) == (["backoff"], False)
    await world.clock.advance(5.0)
    assert (world.states(), world.record().asleep) == (["ready"], False)


REFUSED = [
    ("not ready", VLLM, "starting"),
    ("not started for it", "[{engine: simulator}]", "set `sleep: true` in its pool"),
]


@pytest.mark.parametrize(("pools", "words"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
async def test_what_cannot_sleep_says_why(world: World, pools: str, words: str) -> None:
    if words == "starting":
        world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, pools))
    with pytest.raises(RefusedError, match=words):
        keeper(world).lower(Rung.ASLEEP, "test", 1)


async def test_one_that_runs_by_another_command_is_started_anew_first(world: World) -> None:
    """It was not started for sleep, whatever the configuration says now."""
    manager = await world.start(configuration(world.run_dir, "[{engine: simulator, replicas: 2}]"))
    manager.keepers["m-1"].apply(Event.RESTART)  # so that the first has to wait
    manager.reload(configuration(world.run_dir, "[{engine: simulator, replicas: 2, sleep: true}]"))
    await world.clock.advance(1.0)
    assert keeper(world).state.phase is Phase.READY
    with pytest.raises(RefusedError, match="about to be started anew with a changed command"):
        keeper(world).lower(Rung.ASLEEP, "test", 1)


async def test_asked_twice_it_is_told_once(world: World) -> None:
    kept = await asleep(world)
    count = len(posted(world))
    kept.lower(Rung.ASLEEP, "test", 1)
    with pytest.raises(RefusedError, match="it sleeps at level 1; wake it first"):
        kept.lower(Rung.ASLEEP, "test", 2)
    world.fetch.answers["/is_sleeping"] = AWAKE
    kept.raise_("test")
    kept.raise_("test")
    await world.clock.advance(1.0)
    kept.raise_("test")
    assert len(posted(world)) == count + 1
    kept.apply(Event.STOP)
    with pytest.raises(RefusedError, match="only what sleeps can be woken"):
        kept.raise_("test")


async def test_a_disk_that_takes_no_note_lets_nobody_sleep(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start(configuration(world.run_dir, SGLANG))

    def full(_entry: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.journal, "append", full)
    keeper(world).lower(Rung.ASLEEP, "test", 1)
    await world.clock.advance(DRAINED_S)
    assert posted(world) == []
    assert (world.states(), world.record().asleep) == (["ready"], False)
    assert "No space left" in world.record().reason


def succeed(world: World) -> None:
    """Have the process outlive its manager."""
    (launch,) = world.journal.live.values()
    world.provider.left_behind[launch.launch_id] = FakeProcess(4000, (), {})


async def test_a_later_manager_adopts_it_asleep_and_can_wake_it(world: World) -> None:
    kept = await asleep(world, SGLANG)
    succeed(world)
    await kept.close()
    del world.fetch.asked[:]
    await world.start(configuration(world.run_dir, SGLANG))
    record = world.record()
    assert (record.state.value, record.asleep, record.pid) == ("ready", True, 4000)
    assert set(world.fetch.asked) == {"/ready"}
    keeper(world).raise_("test")
    await world.clock.advance(1.0)
    assert posted(world)[-2:] == ["/resume_memory_occupation", "/continue_generation"]
    assert (world.states(), world.record().asleep) == (["ready"], False)


@pytest.mark.parametrize("level", [None, 1])
async def test_one_whose_manager_died_in_the_turn_is_started_anew(
    world: World, level: int | None
) -> None:
    await world.start(configuration(world.run_dir, SGLANG))
    (launch,) = world.journal.live.values()
    world.journal.append(Nap(launch.launch_id, level, turning=True))
    succeed(world)
    await keeper(world).close()
    await world.start(configuration(world.run_dir, SGLANG))
    process = world.provider.left_behind[launch.launch_id]
    assert process.signals == [signal.SIGTERM]
    assert "/resume_memory_occupation" not in posted(world)


async def test_a_changed_command_waits_until_it_wakes(world: World) -> None:
    await asleep(world)
    assert world.manager is not None
    changed = "[{engine: simulator, sleep: true, args: [--x]}]"
    world.manager.reload(configuration(world.run_dir, changed))
    await world.clock.advance(5.0)
    assert world.record().asleep
    assert world.provider.spawned[0].signals == []
    world.fetch.answers["/is_sleeping"] = AWAKE
    keeper(world).raise_("test")
    await world.clock.advance(2.0)
    assert world.provider.spawned[0].signals == [signal.SIGTERM]
