"""Replicas and their GPUs: over fakes, and with managers and engines as real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from backends.cards import Cards
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.lifecycle import Event
from backends.log import Log
from proxy.contract import ReplicaRecord
from tests.fakes import nvidia_smi
from tests.fakes.provider import FakeProcess
from tests.fakes.region import PATIENCE_S, Region, alive, until
from tests.fakes.world import World, configuration

LOGS = Path(__file__).parents[1] / "fakes" / "engine_logs"
THREE = "[{engine: simulator, gpus: 1, replicas: 3}]"
ONE = "[{engine: simulator, gpus: 1}]"
TWO_NODES = GpuInventory(
    tuple(Gpu(device=str(n), uuid=f"GPU-{n}", numa_node=n) for n in range(2)), frozenset({1})
)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A manager of two cards."""
    world = World(tmp_path)
    world.cards = Cards(GpuLeases(TWO_NODES), Log(world.stream))
    yield world
    await world.close()


async def test_two_start_and_the_third_waits_for_a_card(world: World) -> None:
    manager = await world.start(configuration(world.run_dir, THREE))
    first, second = world.provider.spawned
    assert first.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert second.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert second.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert second.argv[:3] == ("numactl", "--cpunodebind=1", "--preferred=1")
    assert "numactl" not in first.argv, "its node may not be bound to"
    assert [world.record(index).gpus for index in range(3)] == [("0",), ("1",), ()]
    waiting = world.record(2)
    assert (waiting.state.value, waiting.restarts) == ("backoff", 0)
    assert waiting.reason == (
        "not started: it needs 1 GPU and none is free (m-0 has GPU 0; m-1 has GPU 1); it starts "
        "when enough are given back: stop one of these, lower the replicas of a pool, or let pools "
        "share a card by CUDA_VISIBLE_DEVICES in their env"
    )
    manager.keepers["m-0"].apply(Event.STOP)
    await world.clock.advance(1.0)
    first.exit("exited with status 0")
    await world.clock.advance(0.3)
    third = world.provider.spawned[2]
    assert third.env["CUDA_VISIBLE_DEVICES"] == "0", "at once, and no back-off later"
    assert (world.record(2).gpus, world.record(2).restarts) == (("0",), 0)


async def test_waiting_is_neither_a_start_nor_a_failure(world: World) -> None:
    await world.start(configuration(world.run_dir, THREE))
    keeper = world.manager.keepers["m-2"]  # type: ignore[union-attr]
    before = len(world.events())
    await world.clock.advance(300.0)
    assert (keeper.state.starts, keeper.state.failures) == (0, 0)
    tries = [e for e in world.events()[before:] if e["event"] == "replica_starting"]
    assert len(tries) == 10, "every half minute, should nobody wake it"
    assert len(world.provider.spawned) == 2


async def test_one_that_dies_leaves_its_card_to_one_that_waits(world: World) -> None:
    await world.start(configuration(world.run_dir, THREE))
    world.provider.spawned[0].exit("exited with status 1")
    await world.clock.advance(10.0)
    assert [record.gpus for record in map(world.record, range(3))] == [(), ("1",), ("0",)]
    assert "m-2 has GPU 0" in world.record(0).reason


async def test_a_spawn_that_fails_gives_its_card_back(world: World) -> None:
    world.provider.failure = OSError("no more processes")
    await world.start(configuration(world.run_dir, ONE))
    assert world.cards is not None
    assert not world.cards._leases.holders  # type: ignore[union-attr]
    assert "no more processes" in world.record().reason


async def test_the_next_manager_claims_what_the_journal_says(world: World) -> None:
    await world.start(configuration(world.run_dir, THREE))
    launches = list(world.journal.live.values())
    assert [launch.gpus for launch in launches] == [("0",), ("1",)]
    for number, launch in enumerate(launches):
        world.provider.left_behind[launch.launch_id] = FakeProcess(4_000 + number, (), {})
    await world.manager.close()  # type: ignore[union-attr]
    world.cards = Cards(GpuLeases(TWO_NODES), Log(world.stream))
    await world.start(configuration(world.run_dir, THREE))
    assert len(world.provider.spawned) == 2, "nothing was started on their cards"
    assert [world.record(index).gpus for index in range(3)] == [("0",), ("1",), ()]


async def test_a_pool_that_pins_its_replicas(world: World) -> None:
    pools = "[{engine: simulator, replicas: 2, gpus: 1, env: {CUDA_VISIBLE_DEVICES: '1'}}]"
    await world.start(configuration(world.run_dir, pools))
    assert world.states() == ["ready", "ready"]
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in world.provider.spawned] == ["1", "1"]


async def test_other_cards_are_another_process(world: World) -> None:
    manager = await world.start(configuration(world.run_dir, ONE))
    manager.reload(configuration(world.run_dir, "[{engine: simulator, gpus: 2}]"))
    await world.clock.advance(1.0)
    world.provider.spawned[0].exit("exited with status 0")
    await world.clock.advance(1.0)
    assert world.record().gpus == ("0", "1")


async def test_without_an_inventory_the_environment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    world = World(tmp_path)
    await world.start(configuration(tmp_path, THREE))
    assert {p.env["CUDA_VISIBLE_DEVICES"] for p in world.provider.spawned} == {"6,7"}
    assert "CUDA_DEVICE_ORDER" not in world.provider.spawned[0].env
    await world.close()


def say(world: World, text: str) -> None:
    """Be the engine that writes to the log of m-0."""
    path = world.run_dir / "logs" / "m-0.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as log:
        log.write(text)


async def test_the_reason_has_the_engines_own_words(world: World) -> None:
    say(world, (LOGS / "vllm-port.txt").read_text())  # of a life before
    world.fetch.answers["/health"] = world.fetch.answers["/health"].__class__(503)
    pools = "[{engine: simulator, gpus: 1, args: [--api-token, hush-hush]}]"
    await world.start(configuration(world.run_dir, pools))
    say(world, (LOGS / "vllm-unknown-flag.txt").read_text())
    world.provider.spawned[0].exit("exited with status 2")
    await world.clock.advance(0.3)
    log = world.run_dir / "logs" / "m-0.log"
    assert world.record().reason == (
        "exited with status 2 before it was ready: vllm serve: error: unrecognized arguments: "
        f"--tensor-paralel-size 2 --api-token ***; see {log}"
    )


DEATHS = [
    ("of itself", "exited with status 1", "torch.OutOfMemoryError"),
    ("killed: its log is of something else", "killed by SIGKILL", ""),
    ("by a fault", "killed by SIGSEGV", "torch.OutOfMemoryError"),
]


@pytest.mark.parametrize(("how", "words"), [d[1:] for d in DEATHS], ids=[d[0] for d in DEATHS])
async def test_what_is_said_of_one_that_served(world: World, how: str, words: str) -> None:
    await world.start(configuration(world.run_dir, ONE))
    say(world, (LOGS / "vllm-out-of-memory.txt").read_text())
    world.provider.spawned[0].exit(how)
    await world.clock.advance(0.3)
    reason = world.record().reason
    assert reason.startswith(how + (f": {words}" if words else ""))
    assert bool(words) == ("; see " in reason)


async def test_one_that_served_and_said_nothing(world: World) -> None:
    await world.start(configuration(world.run_dir, ONE))
    say(world, "all is well\n")
    world.provider.spawned[0].exit("exited with status 1")
    await world.clock.advance(0.3)
    assert world.record().reason == "exited with status 1"


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    region = Region(tmp_path)
    yield region
    region.clean()


def by_id(region: Region) -> dict[str, ReplicaRecord]:
    fleet = region.fleet()
    return {replica.replica_id: replica for replica in fleet.replicas} if fleet else {}


def ready_on(region: Region, **gpus: str) -> dict[str, ReplicaRecord]:
    """Wait until these replicas are ready on these cards."""

    def look() -> dict[str, ReplicaRecord] | None:
        fleet = by_id(region)
        there = {
            name: ",".join(replica.gpus)
            for name, replica in fleet.items()
            if replica.state.value == "ready"
        }
        return fleet if there == {f"{name}-0": cards for name, cards in gpus.items()} else None

    return until(look, f"{gpus}; {by_id(region)}; the log:\n{region.log}")


def environment(pid: int) -> dict[str, str]:
    """Return what a process was started with."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        pairs = (item.partition(b"=") for item in file.read().split(b"\0") if item)
        return {name.decode(): value.decode() for name, _, value in pairs}


@pytest.mark.faults
def test_cards_of_real_processes(region: Region) -> None:
    """Two get a card, a third takes over what is given back, and a new manager knows all that."""
    region.settings = {"gpus": "0,1"}
    pools = [{"name": name, "gpus": 1} for name in "abc"]
    region.write(*pools[1:], **pools[0])
    first = region.start()
    fleet = ready_on(region, a="0", b="1")
    assert environment(fleet["a-0"].pid)["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment(fleet["b-0"].pid)["CUDA_VISIBLE_DEVICES"] == "1"
    until(lambda: by_id(region)["c-0"].state.value == "backoff", "c waits")
    assert "(a-0 has GPU 0; b-0 has GPU 1)" in by_id(region)["c-0"].reason
    region.write(*pools[2:], **pools[1])  # a is no longer wanted
    first.send_signal(signal.SIGHUP)
    fleet = ready_on(region, b="1", c="0")
    assert fleet["c-0"].restarts == 0
    first.kill()
    first.wait()
    region.write(*pools[1:], **pools[0])  # a is wanted again, of a manager that has started nothing
    second = region.start()
    ready_on(region, b="1", c="0")
    until(lambda: by_id(region)["a-0"].state.value == "backoff", "a waits")
    assert "b-0 has GPU 1" in by_id(region)["a-0"].reason
    os.kill(fleet["b-0"].pid, signal.SIGKILL)
    after = ready_on(region, a="1", c="0")
    second.terminate()
    assert second.wait(PATIENCE_S) == 0
    assert not any(alive(replica.pid) for replica in after.values() if replica.pid)


@pytest.mark.faults
def test_cards_that_nvidia_smi_lists(region: Region, tmp_path: Path) -> None:
    programs = nvidia_smi.install(tmp_path / "bin", nvidia_smi.PAIRS)
    region.environ["PATH"] = nvidia_smi.search_path(programs)
    region.environ.pop("CUDA_VISIBLE_DEVICES", None)
    region.write({"name": "b", "gpus": 1}, name="a", gpus=2)
    manager = region.start()
    fleet = ready_on(region, a="0,1", b="2")
    assert "0: NVIDIA A100 80GB PCIe, 4 of 81,920 MiB used, NVLink group 0" in region.log
    assert environment(fleet["a-0"].pid)["CUDA_VISIBLE_DEVICES"] == "0,1"
    manager.terminate()
    assert manager.wait(PATIENCE_S) == 0


@pytest.mark.faults
def test_a_card_that_is_not_there_stops_the_start(region: Region, tmp_path: Path) -> None:
    programs = nvidia_smi.install(tmp_path / "bin", nvidia_smi.ONE)
    region.environ["PATH"] = nvidia_smi.search_path(programs)
    region.settings = {"gpus": "0-1"}
    region.write()
    assert region.start().wait(PATIENCE_S) == 1
    assert "manager.gpus names GPU '1', which is not there; nvidia-smi lists: 0" in region.log


def test_the_journal_keeps_cards_of_lives_that_it_had_none_for() -> None:
    """A journal of a manager that knew nothing of cards is read."""
    from backends.journal import Launch, replay

    old = (
        b'{"entry":"intent","launch_id":"x","replica_id":"m-0","launch_hash":"h","engine":"vllm",'
        b'"model":"m","pool":"m","port":1,"stop_grace_s":1.0,"starts":1,"at_s":1.0}'
    )
    live, damaged = replay([old])
    assert (live["x"].gpus, damaged) == ((), 0)
    again = msgspec.json.decode(msgspec.json.encode(live["x"]), type=Launch)
    assert again == live["x"]
