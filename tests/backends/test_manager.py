"""The manager keeps its replicas, whatever happens to them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.feed import PUBLISH_PAUSE_S
from backends.fetch import Answer, Silence
from backends.lifecycle import Event
from backends.questions import LISTING_INTERVAL_S
from backends.watch import SILENCE_S_MAX
from proxy.contract import ReplicaState
from tests.fakes.provider import FakeProcess, settle
from tests.fakes.world import World, configuration

STATE = ReplicaState
NONE = "[{engine: simulator, replicas: 0}]"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.close()


async def test_replicas_start_and_are_published_with_names_and_load(world: World) -> None:
    world.fetch.busy(3, 1)
    manager = await world.start()
    assert world.states() == ["ready", "ready"]
    record = world.record()
    assert record.replica_id == "m-0"
    assert record.url == f"http://127.0.0.1:{world.provider.spawned[0].port}"
    assert (record.models, record.pid, record.restarts) == (("m", "m-lora"), 4000, 0)
    assert record.load is not None
    assert (record.load.running, record.load.waiting, record.load.kv_used_ratio) == (3, 1, 0.5)
    urls = {record.url for record in manager.feed.snapshot.replicas}
    assert len(urls) == 2, "no port twice"


async def test_a_replica_is_not_ready_before_it_says_so(world: World) -> None:
    world.fetch.answers["/health"] = Answer(503)
    await world.start()
    assert world.states() == ["starting", "starting"]
    world.fetch.answers["/health"] = Answer(200)
    await world.clock.advance(2.0)
    assert world.states() == ["ready", "ready"]


async def test_a_death_is_followed_by_a_restart_after_the_back_off(world: World) -> None:
    await world.start()
    url = world.record().url
    world.provider.spawned[0].exit("killed by SIGKILL")
    await world.clock.advance(0.1)
    assert world.states() == ["backoff", "ready"]
    record = world.record()
    assert (record.reason, record.pid, record.load) == ("killed by SIGKILL", 0, None)
    await world.clock.advance(3.7)
    assert len(world.provider.spawned) == 2, "the back-off is 4 s"
    await world.clock.advance(0.5)
    assert world.states() == ["ready", "ready"]
    assert (world.record().restarts, world.record().url) == (1, url)


async def test_back_off_grows_while_it_keeps_dying(world: World) -> None:
    world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    for pause_s in (4.0, 8.0, 16.0):
        count = len(world.provider.spawned)
        world.provider.spawned[-1].exit()
        await world.clock.advance(pause_s - 0.5)
        assert len(world.provider.spawned) == count
        await world.clock.advance(1.0)
        assert len(world.provider.spawned) == count + 1


async def test_a_program_that_is_missing_costs_only_its_own_replica(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    await world.start(configuration(world.run_dir, "[{engine: vllm}, {engine: simulator}]"))
    assert world.states() == ["backoff", "ready"]
    assert "/python -m pip install -e " in world.record().reason


async def test_a_spawn_that_fails_leaves_no_account_open(world: World) -> None:
    world.provider.failure = OSError("no more processes")
    await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    assert world.states() == ["backoff"]
    assert world.record().reason == "not started: no more processes"
    assert not world.journal.live
    world.provider.failure = None
    await world.clock.advance(5.0)
    assert world.states() == ["ready"]


async def test_a_journal_that_cannot_be_written_starts_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_entry: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.journal, "append", full)
    await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    assert not world.provider.spawned
    assert world.states() == ["backoff"]
    assert "No space left" in world.record().reason


async def test_stop_goes_down_in_order(world: World) -> None:
    """Drain until idle, SIGTERM, and SIGKILL only after the grace."""
    world.fetch.busy(1, 0)
    manager = await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    process = world.provider.spawned[0]

    stopping = asyncio.ensure_future(manager.stop())
    await world.clock.advance(5.0)
    assert (world.states(), process.signals) == (["draining"], [])
    world.fetch.busy(0, 0)
    await world.clock.advance(1.0)
    assert (world.states(), process.signals) == (["stopping"], [signal.SIGTERM])
    await world.clock.advance(29.0)
    assert process.signals == [signal.SIGTERM], "the grace is 30 s"
    await world.clock.advance(2.0)
    assert process.signals == [signal.SIGTERM, signal.SIGKILL]
    process.exit("killed by SIGKILL")
    await world.clock.advance(0.1)
    assert stopping.done()
    assert not world.journal.live
    assert manager.feed.snapshot.replicas == ()


async def test_idle_must_last_before_it_counts(world: World) -> None:
    """A request that left a proxy before it knew of the drain is waited for."""
    manager = await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    manager.reload(configuration(world.run_dir, NONE))
    await settle()
    assert world.provider.spawned[0].signals == [], "one idle reading is not enough"
    world.fetch.busy(1, 0)
    await world.clock.advance(3.0)
    assert world.provider.spawned[0].signals == []
    world.fetch.busy(0, 0)
    await world.clock.advance(1.0)
    assert world.provider.spawned[0].signals == [signal.SIGTERM]


async def test_hurry_kills_at_once(world: World) -> None:
    world.fetch.busy(1, 0)
    manager = await world.start()

    stopping = asyncio.ensure_future(manager.stop())
    await settle()
    manager.hurry()
    await settle()
    assert [p.signals for p in world.provider.spawned] == [[signal.SIGKILL], [signal.SIGKILL]]
    for process in world.provider.spawned:
        process.exit("killed by SIGKILL")
    await world.clock.advance(0.1)
    assert stopping.done()


async def test_sglang_is_told_to_abort_before_sigterm(world: World) -> None:
    pools = "[{engine: simulator, args: [--dialect, sglang]}]"
    manager = await world.start(configuration(world.run_dir, pools))
    manager.keepers["m-0"].apply(Event.RESTART)
    await world.clock.advance(31.0)
    process = world.provider.spawned[0]
    assert world.fetch.posted == [f"http://127.0.0.1:{process.port}/abort_request"]
    assert process.signals[0] == signal.SIGTERM


async def test_busy_is_not_dead_but_silence_ends(world: World) -> None:
    await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    process = world.provider.spawned[0]
    world.fetch.silence = Silence.TIMEOUT
    await world.clock.advance(SILENCE_S_MAX - 10)
    assert (world.states(), process.signals) == (["ready"], [])
    world.fetch.silence = None
    await world.clock.advance(5.0)
    world.fetch.silence = Silence.TIMEOUT
    await world.clock.advance(SILENCE_S_MAX - 10)
    assert process.signals == [], "one answer and the count begins anew"
    await world.clock.advance(20.0)
    assert process.signals == [signal.SIGTERM]
    assert "no answer for 300 s" in world.record().reason


RANKS = """\
vllm:num_requests_running{engine="0"} 1
vllm:num_requests_running{engine="1"} 2
vllm:lora_requests_info{running_lora_adapters="x",waiting_lora_adapters=""} 1.0
"""
LISTED = b'{"data":[{"id":"m","parent":null},{"id":"%b","parent":"m"}]}'


async def test_ranks_and_adapters_are_published_and_kept_over_a_restart(world: World) -> None:
    world.fetch.answers["/metrics"] = Answer(200, RANKS.encode())
    world.fetch.answers["/v1/models"] = Answer(200, LISTED % b"fr")
    await world.start(configuration(world.run_dir, "[{engine: simulator, weight: 2.5}]"))
    record = world.record()
    assert (record.dp_size, record.adapters, record.weight) == (2, ("x",), 2.5)
    assert record.load is not None
    assert [rank.running for rank in record.load.ranks] == [1, 2]
    world.fetch.answers["/v1/models"] = Answer(200, LISTED % b"sql")
    await world.clock.advance(LISTING_INTERVAL_S + 2.0)
    record = world.record()
    assert (record.models, record.adapters) == (("m", "sql"), ("x",))
    listed = (LISTED % b"sql").replace(b'"m"', b'"/models/m"')
    world.fetch.answers["/v1/models"] = Answer(200, listed)
    await world.clock.advance(LISTING_INTERVAL_S + 2.0)
    assert world.record().models == ("m", "sql"), "it is what it was started as"
    world.provider.spawned[0].exit()
    await world.clock.advance(0.1)
    assert world.states() == ["backoff"]
    assert (world.record().dp_size, world.record().load) == (2, None)
    world.fetch.busy(0, 0)  # the next one has but one
    await world.clock.advance(5.0)
    assert world.states() == ["ready"]
    assert world.record().dp_size == 1


async def test_metrics_that_are_off_are_no_silence(world: World) -> None:
    manager = await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    world.fetch.answers["/metrics"] = Answer(404)
    await world.clock.advance(SILENCE_S_MAX + 10)
    assert world.states() == ["ready"]
    assert manager.keepers["m-0"].questions.failures > 0


async def test_a_start_that_takes_too_long_is_ended_and_tried_again(world: World) -> None:
    world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, "[{engine: simulator, start_timeout_secs: 20}]"))
    await world.clock.advance(20.5)
    process = world.provider.spawned[0]
    assert process.signals == [signal.SIGTERM]
    process.exit()
    await world.clock.advance(0.1)
    assert world.states() == ["backoff"]
    assert world.record().reason == "not ready after 20 s"


POOL = "[{engine: simulator}]"


async def test_adoption_keeps_a_ready_replica_ready(world: World) -> None:
    process = world.leave_behind("m-0", POOL)
    await world.start(configuration(world.run_dir, POOL))
    assert not world.provider.spawned
    record = world.record()
    assert (record.state, record.pid, record.restarts) == (STATE.READY, 77, 1)
    assert record.url == "http://127.0.0.1:20500"
    process.exit("exited")
    await world.clock.advance(5.0)
    assert world.record().restarts == 2, "its death is noticed like any other"
    assert len(world.provider.spawned) == 1


ADOPTIONS = [
    ("busy, was ready", True, Silence.TIMEOUT, STATE.READY),
    ("busy, never was ready", False, Silence.TIMEOUT, STATE.STARTING),
    ("nobody listens, was ready", True, Silence.REFUSED, STATE.STARTING),
    ("answers, never was ready", False, None, STATE.READY),
]


@pytest.mark.parametrize(
    ("ready", "silence", "state"), [c[1:] for c in ADOPTIONS], ids=[c[0] for c in ADOPTIONS]
)
async def test_adoption(
    world: World, ready: bool, silence: Silence | None, state: ReplicaState
) -> None:
    world.leave_behind("m-0", POOL, ready=ready)
    world.fetch.silence = silence
    await world.start(configuration(world.run_dir, POOL))
    assert world.record().state is state
    assert not world.provider.spawned


async def test_what_was_left_behind_and_is_not_wanted_is_stopped_in_order(world: World) -> None:
    process = world.leave_behind("gone-0", POOL)
    world.fetch.busy(1, 0)
    await world.start(configuration(world.run_dir, POOL))
    assert process.signals == []
    world.fetch.busy(0, 0)
    assert world.record(0).state is STATE.DRAINING
    await world.clock.advance(1.0)
    assert process.signals == [signal.SIGTERM]
    await world.clock.advance(7.5)
    assert process.signals == [signal.SIGTERM, signal.SIGKILL], "its own grace of 7 s is journalled"
    process.exit("exited")
    await world.clock.advance(0.1)
    assert [r.replica_id for r in world.manager.feed.snapshot.replicas] == ["m-0"]  # type: ignore[union-attr]


async def test_what_was_left_behind_with_another_command_is_replaced(world: World) -> None:
    process = world.leave_behind("m-0", "[{engine: simulator, args: [--old]}]")
    await world.start(configuration(world.run_dir, POOL))
    await world.clock.advance(1.0)
    assert process.signals == [signal.SIGTERM]
    process.exit("exited")
    await world.clock.advance(0.2)
    assert "--old" not in world.provider.spawned[0].argv
    assert world.states() == ["ready"]


async def test_a_life_that_ended_unseen_is_closed(world: World) -> None:
    world.leave_behind("m-0", POOL)
    world.provider.left_behind.clear()
    await world.start(configuration(world.run_dir, POOL))
    assert len(world.provider.spawned) == 1
    assert len(world.journal.live) == 1


async def test_reload_rolls_a_change_one_replica_at_a_time(world: World) -> None:
    manager = await world.start()
    first, second = world.provider.spawned
    manager.reload(configuration(world.run_dir, "[{engine: simulator, replicas: 2, args: [--x]}]"))
    await world.clock.advance(1.0)
    assert (first.signals, second.signals) == ([signal.SIGTERM], [])
    first.exit("exited")
    await world.clock.advance(2.0)
    assert world.provider.spawned[2].argv[-1] == "--x"
    assert second.signals == [signal.SIGTERM], "now that the first is back"
    second.exit("exited")
    await world.clock.advance(1.0)
    assert world.states() == ["ready", "ready"]


async def test_reload_adds_removes_and_retunes(world: World) -> None:
    manager = await world.start()
    pools = "[{engine: simulator, replicas: 1, target_inputs: 5}, {engine: simulator, name: two}]"
    manager.reload(configuration(world.run_dir, pools))
    await world.clock.advance(1.0)
    world.provider.spawned[1].exit("exited")
    await world.clock.advance(1.0)
    records = manager.feed.snapshot.replicas
    assert {r.replica_id: r.target_inputs for r in records} == {"m-0": 5, "two-0": 0}
    assert world.provider.spawned[0].signals == [], "a target needs no restart"


async def test_an_operator_holds_and_releases(world: World) -> None:
    manager = await world.start()
    manager.keepers["m-0"].apply(Event.HOLD, "drained by an operator")
    await world.clock.advance(1.0)
    assert world.states() == ["draining", "ready"]
    assert world.provider.spawned[0].signals == [], "a held replica runs on"
    manager.keepers["m-0"].apply(Event.RELEASE)
    await world.clock.advance(0.1)
    assert world.states() == ["ready", "ready"]


@pytest.mark.parametrize("dialect", ["sglang", "vllm"])
async def test_a_replica_that_takes_ids_from_heads_is_told_of_by_the_manager_after(
    world: World, dialect: str
) -> None:
    pools = f"[{{engine: simulator, args: ['--dialect', {dialect}]}}]"
    manager = await world.start(configuration(world.run_dir, pools))
    (launch,) = world.journal.live.values()
    world.provider.left_behind[launch.launch_id] = world.provider.spawned[0]
    assert world.record().rid_header is (dialect == "sglang")
    assert len(world.record().priority_fields) == 3
    await manager.keepers["m-0"].close()
    await world.start(configuration(world.run_dir, pools))
    assert len(world.provider.spawned) == 1
    assert world.record().rid_header is (dialect == "sglang")
    assert len(world.record().priority_fields) == 3


async def test_a_hold_outlives_the_manager(world: World) -> None:
    manager = await world.start(configuration(world.run_dir, POOL))
    manager.keepers["m-0"].apply(Event.HOLD)
    (launch,) = world.journal.live.values()
    assert launch.held
    world.provider.left_behind[launch.launch_id] = FakeProcess(4000, (), {})
    await manager.close()
    await world.start(configuration(world.run_dir, POOL))
    assert world.states() == ["draining"]
    world.manager.keepers["m-0"].apply(Event.RELEASE)  # type: ignore[union-attr]
    assert not next(iter(world.journal.live.values())).held


async def test_a_death_before_ready_points_to_the_log(world: World) -> None:
    world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, POOL))
    world.provider.spawned[0].exit("exited with status 1")
    await world.clock.advance(0.1)
    log = world.run_dir / "logs" / "m-0.log"
    assert world.record().reason == f"exited with status 1 before it was ready; see {log}"


async def test_many_changes_are_few_snapshots(world: World) -> None:
    manager = await world.start()
    before = manager.feed.snapshot.version
    for index in range(100):
        world.fetch.busy(index, 0)
        await world.clock.advance(0.1)
    published = manager.feed.snapshot.version - before
    assert 0 < published <= 10.0 / PUBLISH_PAUSE_S
    for _ in range(50):
        manager.keepers["m-0"].apply(Event.HOLD)
        manager.keepers["m-0"].apply(Event.RELEASE)
    before = manager.feed.snapshot.version
    await world.clock.advance(PUBLISH_PAUSE_S)
    assert manager.feed.snapshot.version - before <= 2


async def test_nothing_secret_is_logged(world: World) -> None:
    pools = "[{engine: simulator, args: [--api-key, hush-hush], env: {HF_TOKEN: hush-hush}}]"
    await world.start(configuration(world.run_dir, pools))
    assert any(event["event"] == "replica_ready" for event in world.events())
    assert "hush-hush" not in world.stream.getvalue()
    assert "hush-hush" not in (world.run_dir / "journal").read_text()
