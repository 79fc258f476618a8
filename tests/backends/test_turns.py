"""Replicas that are suspended and come back, on their cards or on others; and what goes wrong."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from backends import turns
from backends.cards import Cards
from backends.demand import DemandBook
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.journal import Suspension
from backends.keeper import Keeper
from backends.ladder import OUT_S_MIN, Rung
from backends.lifecycle import Event, Phase
from backends.log import Log
from backends.reconcile import Wanted
from backends.snapshots.base import Capability, SuspendError
from backends.turns import RefusedError
from backends.watch import SILENCE_S_MAX
from proxy.contract.demand import Demand, ReplicaDemand
from tests.fakes.provider import FakeProcess
from tests.fakes.suspender import FakeDemand
from tests.fakes.world import World, configuration

PLAIN = "[{engine: simulator, gpus: 1}]"
SLEEPY = "[{engine: simulator, gpus: 1, sleep: true, args: [--dialect, sglang]}]"
TWO = "[{name: a, engine: simulator, gpus: 1}, {name: b, engine: simulator, gpus: 1}]"
DRAINED_S = 1.0
SLEPT = ["/pause_generation", "/flush_cache?timeout=10", "/release_memory_occupation"]
WOKEN = ["/resume_memory_occupation", "/continue_generation"]


def cards(count: int, names: str = "HHHH") -> tuple[Gpu, ...]:
    return tuple(Gpu(device=str(n), uuid=f"GPU-{n}", name=names[n]) for n in range(count))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A manager of one card."""
    world = World(tmp_path)
    world.cards = Cards(GpuLeases(GpuInventory(cards(1))), Log(world.stream))
    world.fetch.answers |= {"/ready": world.fetch.answers["/health"]}
    yield world
    await world.close()


def keeper(world: World, name: str = "m-0") -> Keeper:
    assert world.manager is not None
    return world.manager.keepers[name]


def posted(world: World) -> list[str]:
    return ["/" + url.split("/", 3)[3] for url in world.fetch.posted]


def holders(world: World) -> dict[str, tuple[str, ...]]:
    assert world.cards is not None
    leases = world.cards._leases
    assert leases is not None
    return dict(leases.holders)


async def suspended(world: World, pools: str = PLAIN, name: str = "m-0") -> Keeper:
    """Return the keeper of a replica that is suspended."""
    await world.start(configuration(world.run_dir, pools))
    keeper(world, name).lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S)
    assert keeper(world, name).state.phase is Phase.SUSPENDED
    return keeper(world, name)


async def test_it_is_drained_then_suspended_and_its_card_is_free(world: World) -> None:
    await world.start(configuration(world.run_dir, PLAIN))
    world.fetch.busy(1, 0)
    await world.clock.advance(1.5)
    kept = keeper(world)
    kept.lower(Rung.SUSPENDED, "test")
    await world.clock.advance(5.0)
    assert (world.states(), world.suspender.asked) == (["draining"], [])
    world.fetch.busy(0, 0)
    await world.clock.advance(DRAINED_S)
    record = world.record()
    assert world.suspender.asked == [("suspend", 4000, None)]
    assert (record.state.value, record.asleep, record.load) == ("ready", True, None)
    assert record.reason.startswith("suspended, after ")
    assert world.fetch.dropped == [record.url]
    assert (kept.rung, holders(world)) == (Rung.SUSPENDED, {})
    assert kept.turns[Rung.SUSPENDED].host_bytes == 1000


async def test_nothing_is_asked_of_it_while_it_stands_still(world: World) -> None:
    kept = await suspended(world)
    del world.fetch.asked[:]
    await world.clock.advance(SILENCE_S_MAX + 100.0)
    assert world.fetch.asked == []
    assert kept.state.phase is Phase.SUSPENDED
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert world.states() == ["ready"], "the long silence was nobody's fault"
    await world.clock.advance(20.0)
    assert world.states() == ["ready"]


async def test_what_can_sleep_sleeps_first_and_is_woken_last(world: World) -> None:
    kept = await suspended(world, SLEEPY)
    assert posted(world) == SLEPT
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert world.suspender.words == ["suspend", "resume"]
    assert posted(world) == SLEPT + WOKEN
    record = world.record()
    assert (record.state.value, record.asleep) == ("ready", False)
    assert record.reason.startswith("awake, after ")
    assert (kept.rung, holders(world)) == (Rung.AWAKE, {"m-0": ("0",)})
    (launch,) = world.journal.live.values()
    assert (launch.nap_level, launch.turning, launch.suspended, launch.suspending) == (
        None, False, False, False,
    )  # fmt: skip


async def test_one_that_sleeps_is_deepened(world: World) -> None:
    await world.start(configuration(world.run_dir, SLEEPY))
    kept = keeper(world)
    kept.lower(Rung.ASLEEP, "test")
    await world.clock.advance(DRAINED_S)
    assert (kept.rung, holders(world)) == (Rung.ASLEEP, {"m-0": ("0",)})
    kept.lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S)
    assert (kept.rung, holders(world), posted(world)) == (Rung.SUSPENDED, {}, SLEPT)
    with pytest.raises(RefusedError, match="suspended already"):
        kept.lower(Rung.ASLEEP, "test")


async def test_two_models_take_turns_on_one_card(world: World) -> None:
    kept = await suspended(world, TWO, "a-0")
    other = keeper(world, "b-0")
    await world.clock.advance(70.0)
    assert holders(world) == {"b-0": ("0",)}, "it waited for the card"
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert kept.state.phase is Phase.SUSPENDED
    assert kept.state.reason.startswith("not resumed: it needs 1 GPU and none is free (b-0")
    assert kept.observed.rising
    asked = len(world.suspender.asked)
    other.lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S)
    assert (kept.state.phase, other.state.phase) == (Phase.READY, Phase.SUSPENDED)
    assert world.suspender.words[asked:] == ["suspend", "resume"]
    assert holders(world) == {"a-0": ("0",)}


async def test_one_that_waits_for_a_card_need_not_come_back(world: World) -> None:
    kept = await suspended(world, TWO, "a-0")
    await world.clock.advance(70.0)
    kept.raise_("test")
    await world.clock.advance(1.0)
    kept.lower(Rung.SUSPENDED, "test")
    assert not kept.observed.rising
    keeper(world, "b-0").apply(Event.HOLD)
    keeper(world, "b-0").lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S + 100.0)
    assert kept.state.phase is Phase.SUSPENDED
    assert holders(world) == {}


MOVES = [
    ("to others of the same model", "HHHH", True, {"GPU-0": "GPU-1"}),
    ("not where the driver cannot", "HHHH", False, None),
    ("not to another model", "HLLL", True, None),
]


@pytest.mark.parametrize(
    ("names", "moves", "moved"), [m[1:] for m in MOVES], ids=[m[0] for m in MOVES]
)
async def test_it_returns_to_its_own_card_or_moves(
    world: World, names: str, moves: bool, moved: dict[str, str] | None
) -> None:
    world.cards = Cards(GpuLeases(GpuInventory(cards(2, names))), Log(world.stream))
    world.suspender.capability = Capability(works=True, moves=moves)
    kept = await suspended(world)
    assert world.cards._leases is not None
    world.cards._leases.claim("stranger", ["0"])
    kept.raise_("test")
    await world.clock.advance(1.0)
    if moved is None:
        assert kept.observed.rising
    else:
        assert world.suspender.asked[-1] == ("resume", 4000, moved)
        assert (world.record().gpus, holders(world)["m-0"]) == (("1",), ("1",))


async def test_one_that_could_not_be_moved_is_still_where_it_was(world: World) -> None:
    """What the driver is told next is from which card it comes, not to which it was to go."""
    world.cards = Cards(GpuLeases(GpuInventory(cards(2))), Log(world.stream))
    world.suspender.capability = Capability(works=True, moves=True)
    kept = await suspended(world)
    assert world.cards._leases is not None
    world.cards._leases.claim("stranger", ["0"])
    world.suspender.failure = SuspendError("the card is full", intact=True)
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert (kept.state.phase, holders(world)) == (Phase.SUSPENDED, {"stranger": ("0",)})
    (launch,) = world.journal.live.values()
    assert (launch.gpus, launch.moving) == (("0",), False)
    world.suspender.failure = None
    await world.clock.advance(100.0)
    assert world.suspender.asked[1:] == [("resume", 4000, {"GPU-0": "GPU-1"})] * 2
    assert (world.states(), holders(world)["m-0"]) == (["ready"], ("1",))


FAILURES = [
    ("intact: serves on", PLAIN, True, Phase.READY, []),
    ("intact: stays asleep", SLEEPY, True, Phase.ASLEEP, []),
    ("not intact: started anew", PLAIN, False, Phase.STOPPING, [signal.SIGTERM]),
]


@pytest.mark.parametrize(
    ("pools", "intact", "phase", "signals"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES]
)
async def test_a_suspension_that_fails(
    world: World, pools: str, intact: bool, phase: Phase, signals: list[int]
) -> None:
    world.suspender.failure = SuspendError("no memory on the host", intact=intact)
    await world.start(configuration(world.run_dir, pools))
    kept = keeper(world)
    kept.lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S)
    assert (kept.state.phase, world.provider.spawned[0].signals) == (phase, signals)
    assert "no memory on the host" in kept.state.reason
    assert holders(world) == {"m-0": ("0",)}
    assert kept.observed.out == {Rung.SUSPENDED}
    await world.clock.advance(OUT_S_MIN)
    assert not kept.observed.out


async def test_one_that_hangs_in_its_suspension_is_started_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SUSPEND_S_MAX", 0.0)
    world.suspender.free.clear()
    await world.start(configuration(world.run_dir, PLAIN))
    keeper(world).lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S)
    process = world.provider.spawned[0]
    assert process.signals == [signal.SIGTERM]
    assert "no end after 0 s" in world.record().reason
    await world.clock.advance(35.0)  # it stands still and hears nothing
    assert process.signals[:2] == [signal.SIGTERM, signal.SIGKILL]


async def test_one_that_cannot_be_resumed_stays_and_is_tried_again_and_given_up(
    world: World,
) -> None:
    kept = await suspended(world)
    world.suspender.failure = SuspendError("the card is full", intact=True)
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert (kept.state.phase, holders(world)) == (Phase.SUSPENDED, {})
    assert "the card is full" in kept.state.reason
    await world.clock.advance(120.0)
    assert world.suspender.words == ["suspend"] + ["resume"] * turns.RESUMES_MAX
    assert world.provider.spawned[0].signals[:1] == [signal.SIGTERM]


@pytest.mark.parametrize("wanted", [False, True])
async def test_a_suspended_one_is_killed_where_others_are_terminated(
    world: World, wanted: bool
) -> None:
    kept = await suspended(world)
    assert world.manager is not None
    if wanted:
        kept.apply(Event.RESTART)
    else:
        nobody = "[{engine: simulator, gpus: 1, replicas: 0}]"
        world.manager.reload(configuration(world.run_dir, nobody))
    process = world.provider.spawned[0]
    assert process.signals == [signal.SIGKILL]
    process.exit("killed by SIGKILL")
    await world.clock.advance(0.5)
    assert "resume" not in world.suspender.words
    assert holders(world) == ({"m-0": ("0",)} if wanted else {})


async def test_what_cannot_be_suspended_says_why(world: World) -> None:
    world.suspender.capability = Capability(works=False, reason="the driver is of 2019")
    await world.start(configuration(world.run_dir, PLAIN))
    with pytest.raises(RefusedError, match="cannot be suspended here: the driver is of 2019"):
        keeper(world).lower(Rung.SUSPENDED, "test")
    assert keeper(world).observed.out == {Rung.SUSPENDED}


async def test_a_full_disk_lets_nobody_be_suspended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start(configuration(world.run_dir, PLAIN))

    def full(_entry: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.journal, "append", full)
    keeper(world).lower(Rung.SUSPENDED, "test")
    await world.clock.advance(DRAINED_S)
    assert (world.states(), world.suspender.asked) == (["ready"], [])
    assert "No space left" in world.record().reason


async def test_it_is_drained_by_the_proxies_own_count(world: World) -> None:
    """The engine cannot know of a request that is bound and not sent yet."""
    demand = world.demand = FakeDemand()
    await world.start(configuration(world.run_dir, PLAIN))
    demand.on = {"m-0": 1}
    kept = keeper(world)
    kept.lower(Rung.SUSPENDED, "test")
    await world.clock.advance(5.0)
    assert kept.state.phase is Phase.EMPTYING
    demand.on = {"m-0": 0}
    await world.clock.advance(DRAINED_S)
    assert kept.state.phase is Phase.SUSPENDED


async def test_a_manager_that_stops_does_not_wait_for_a_proxy_that_is_gone(world: World) -> None:
    """`doherty up` ends the proxy first; its last report was of a request."""
    book = world.demand = DemandBook(world.clock.now_s)
    manager = await world.start(configuration(world.run_dir, PLAIN))
    book.serve(["m"])
    book.publish(manager.feed.snapshot)
    report = Demand(proxy_id="p", sequence=1, replicas={"m-0": ReplicaDemand(in_flight=1)})
    assert book.take(report, world.clock.now_s())
    stopping = asyncio.ensure_future(manager.stop())
    await world.clock.advance(2.0)
    process = world.provider.spawned[0]
    assert process.signals == [], "it may yet be there"
    await world.clock.advance(5.0)
    assert process.signals == [signal.SIGTERM]
    process.exit("exited")
    await world.clock.advance(1.0)
    await stopping


# --- who decides ----------------------------------------------------------------------------------


async def want(world: World, rung: Rung | None) -> None:
    """Be the scaler: want every replica on this rung."""
    manager = world.manager
    assert manager is not None
    wanted = tuple(Wanted(w.spec, w.launch_hash, rung) for w in manager.scaler.wanted())
    manager.scaler.wanted = lambda: wanted  # type: ignore[method-assign]
    manager._changed()
    await world.clock.advance(DRAINED_S)


async def test_it_goes_where_it_is_wanted(world: World) -> None:
    await world.start(configuration(world.run_dir, SLEEPY))
    kept = keeper(world)
    for rung in (Rung.ASLEEP, Rung.SUSPENDED, Rung.AWAKE, Rung.SUSPENDED, Rung.AWAKE):
        await want(world, rung)
        assert kept.rung is rung
    kept.lower(Rung.ASLEEP, "an operator")
    await want(world, None)
    assert kept.rung is Rung.ASLEEP, "nobody decides"


async def test_a_rung_that_fails_is_not_asked_for_without_end(world: World) -> None:
    world.suspender.failure = SuspendError("no memory on the host", intact=True)
    await world.start(configuration(world.run_dir, PLAIN))
    await want(world, Rung.SUSPENDED)
    await world.clock.advance(20.0)
    assert world.suspender.words == ["suspend"]
    await world.clock.advance(100.0)
    assert world.suspender.words == ["suspend"] * 3, "after 30 s and then 60"


async def test_one_that_waits_for_a_card_is_not_asked_without_end(world: World) -> None:
    kept = await suspended(world)
    assert world.cards is not None
    assert world.cards._leases is not None
    world.cards._leases.claim("stranger", ["0"])
    await want(world, Rung.AWAKE)
    lines = len(world.events())
    await world.clock.advance(10.0)
    assert (kept.observed.rising, len(world.events())) == (True, lines)


async def test_one_that_dies_at_rest_is_not_started_for_it(world: World) -> None:
    kept = await suspended(world)
    await want(world, Rung.SUSPENDED)
    world.provider.spawned[0].exit("killed by SIGKILL")
    await world.clock.advance(60.0)
    assert (kept.state.phase, kept.rung) == (Phase.STOPPED, Rung.COLD)
    assert len(world.provider.spawned) == 1
    await want(world, Rung.AWAKE)
    assert world.states() == ["ready"]


# --- the manager after ----------------------------------------------------------------------------


async def succeed(world: World, pools: str) -> Keeper:
    """Have the process outlive its manager, and start the next."""
    (launch,) = world.journal.live.values()
    world.provider.left_behind[launch.launch_id] = FakeProcess(4000, (), {})
    assert world.manager is not None
    await world.manager.close()
    world.cards = Cards(GpuLeases(GpuInventory(cards(1))), Log(world.stream))
    await world.start(configuration(world.run_dir, pools))
    return keeper(world)


async def test_a_later_manager_adopts_it_suspended_and_leaves_its_card_to_others(
    world: World,
) -> None:
    await suspended(world, SLEEPY)
    del world.fetch.asked[:]
    kept = await succeed(world, SLEEPY)
    assert (kept.state.phase, kept.rung, holders(world)) == (Phase.SUSPENDED, Rung.SUSPENDED, {})
    assert world.record().asleep
    assert world.fetch.asked == []
    kept.raise_("test")
    await world.clock.advance(1.0)
    assert (world.states(), posted(world)) == (["ready"], SLEPT + WOKEN)
    assert holders(world) == {"m-0": ("0",)}


@pytest.mark.parametrize("was_suspended", [False, True])
async def test_a_turn_that_a_manager_died_in_is_taken_back(
    world: World, was_suspended: bool
) -> None:
    """The driver tells what is suspended, so there is no need for a new start."""
    await world.start(configuration(world.run_dir, SLEEPY))
    (launch,) = world.journal.live.values()
    entry = Suspension(launch.launch_id, suspended=was_suspended, turning=True)
    world.journal.append(entry)
    kept = await succeed(world, SLEEPY)
    await world.clock.advance(1.0)
    assert world.suspender.asked == [("resume", 4000, None)]
    assert (world.states(), holders(world)) == (["ready"], {"m-0": ("0",)})
    assert kept.rung is Rung.AWAKE
    assert world.provider.left_behind[launch.launch_id].signals == []


async def test_a_move_that_a_manager_died_in_ends_it(world: World) -> None:
    """On which card it comes back nobody knows, and one that is another's it must not take."""
    world.cards = Cards(GpuLeases(GpuInventory(cards(2))), Log(world.stream))
    world.suspender.capability = Capability(works=True, moves=True)
    kept = await suspended(world)
    assert world.cards._leases is not None
    world.cards._leases.claim("stranger", ["0"])
    world.suspender.free.clear()
    kept.raise_("test")
    await world.clock.advance(1.0)
    (launch,) = world.journal.live.values()
    assert (launch.gpus, launch.suspending, launch.moving) == (("1",), True, True)
    kept = await succeed(world, PLAIN)
    assert kept.state.phase is Phase.KILLING
    assert world.provider.left_behind[launch.launch_id].signals == [signal.SIGKILL]
    assert world.suspender.words == ["suspend", "resume"]


async def test_the_cards_that_it_was_resumed_on_are_its_own(world: World) -> None:
    kept = await suspended(world)
    (launch,) = world.journal.live.values()
    moved = Suspension(launch.launch_id, suspended=False, turning=False, gpus=("7",))
    world.journal.append(moved)
    (after,) = world.journal.live.values()
    assert after.gpus == ("7",)
    again = msgspec.json.decode(msgspec.json.encode(after), type=type(after))
    assert again == after
    assert kept.rung is Rung.SUSPENDED
