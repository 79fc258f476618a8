"""A manager that scales: over fake processes, with a clock that the test holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from backends.autoscale import TICK_S
from backends.cards import Cards
from backends.fetch import Answer
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.ladder import Rung, RungCost
from backends.lifecycle import Event, Phase
from backends.log import Log
from backends.snapshots.base import Capability
from proxy.contract.demand import Demand, Elsewhere, ModelDemand
from tests.fakes.provider import METRICS
from tests.fakes.world import World, configuration

ASLEEP, AWAKE = Answer(200, b'{"is_sleeping": true}'), Answer(200, b'{"is_sleeping": false}')
WINDOWS = "stable_window_secs: 10, panic_window_secs: 2, scaledown_window_secs: 5"


def running(count: int) -> Answer:
    """Return metrics of an engine with so many requests, and next to nothing in its KV cache."""
    return Answer(200, METRICS.format(running=count, waiting=0).replace("0.5", "0").encode())


def scaled(more: str = "", scale: str = "min: 0, max: 4", rest: str = "sleep: true") -> str:
    pool = f"engine: simulator, target_inputs: 4, {rest}, autoscale: {{{scale}, {WINDOWS}}}"
    return f"[{{{pool}}}{more}]"


class Scaled(World):
    """A world with a proxy that reports."""

    sequence = 0
    arrivals = 0

    def report(self, in_flight: int = 0, queued: int = 0, arrived: int = 0) -> None:
        assert self.manager is not None
        self.sequence += 1
        self.arrivals += arrived
        told = ModelDemand(in_flight=in_flight, queued=queued, arrivals_total=self.arrivals)
        models = {"m": told}
        self.manager.scaler.take(Demand(proxy_id="p", sequence=self.sequence, models=models))

    async def busy(self, seconds: float, in_flight: int = 0, a_second: int = 0) -> None:
        """Have the proxy report so for a time."""
        for _ in range(int(seconds * 2)):
            self.report(in_flight=in_flight, arrived=a_second // 2)
            await self.clock.advance(0.5)

    async def come_up(self) -> None:
        """Have one start, which takes a second."""
        self.fetch.answers["/health"] = Answer(503)
        self.report(queued=1, arrived=1)
        await self.clock.advance(1.0)
        self.fetch.answers["/health"] = Answer(200)
        await self.clock.advance(0.5)
        self.report(in_flight=1)
        await self.clock.advance(0.5)

    def phases(self) -> dict[str, str]:
        assert self.manager is not None
        return {name: keeper.state.phase.value for name, keeper in self.manager.keepers.items()}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Scaled]:
    world = Scaled(tmp_path)
    world.fetch.answers |= {"/is_sleeping": ASLEEP, "/metrics": running(0)}
    yield world
    await world.close()


async def test_nothing_runs_until_somebody_waits_and_then_at_once(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled()))
    assert (world.phases(), manager.serving) == ({}, True)
    (pool,) = manager.feed.snapshot.pools
    assert (pool.model, pool.wakes, pool.awake, pool.coming) == ("m", True, 0, 0)
    world.report(queued=3, arrived=3)
    assert len(world.provider.spawned) == 1, "not at the next tick: now"
    world.report(queued=4, arrived=1)
    assert len(world.provider.spawned) == 1, "one wakes, whatever waits"
    await world.clock.advance(0.5)
    assert world.phases() == {"m-0": "ready"}
    assert manager.feed.snapshot.pools[0].awake == 1


async def test_it_rests_when_nobody_asks_and_comes_back_from_there(world: Scaled) -> None:
    await world.start(configuration(world.run_dir, scaled()))
    await world.come_up()
    await world.busy(3.0, in_flight=1, a_second=2)
    assert world.phases() == {"m-0": "ready"}
    await world.busy(12.0)
    assert world.phases() == {"m-0": "asleep"}
    world.fetch.answers["/is_sleeping"] = AWAKE
    world.report(queued=1, arrived=1)
    await world.clock.advance(0.3)
    assert world.phases() == {"m-0": "ready"}
    assert len(world.provider.spawned) == 1
    changes = [e for e in world.events() if e["event"] == "scaling"]
    assert [(e["was"], e["desired"]) for e in changes] == [(0, 1), (1, 0), (0, 1)]
    assert changes[-1]["moves"] == ["m-0 up, from asleep"]


async def test_those_at_rest_do_not_pile_up_where_a_new_start_is_quicker(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled(scale="min: 0, max: 2")))
    for _ in range(4):
        world.report(queued=1, arrived=1)
        told = manager.keepers["m-0"].observed.launch_hash
        manager.scaler.ladder.learn(told, "m-9", {Rung.COLD: RungCost(0.001)})
        await world.busy(15.0)
        for process in world.provider.spawned:
            if process.signals and not process.exited.done():
                process.exit("exited with status 0")
        assert len(world.phases()) <= 3
    assert len(world.provider.spawned) > 2


async def test_without_a_rung_to_rest_on_it_ends_and_the_number_is_used_again(
    world: Scaled,
) -> None:
    pools = scaled(scale="min: 0, max: 4, rungs: [cold]")
    await world.start(configuration(world.run_dir, pools))
    world.report(queued=1, arrived=1)
    await world.busy(1.0, in_flight=1)
    await world.busy(12.0)
    assert world.phases() == {"m-0": "stopping"}
    world.provider.spawned[0].exit("exited with status 0")
    await world.clock.advance(1.0)
    assert world.phases() == {}
    world.report(queued=1, arrived=1)
    assert world.phases() == {"m-0": "starting"}


async def test_a_new_manager_keeps_those_who_work_until_it_knows_the_load(world: Scaled) -> None:
    """It has heard of no proxy yet, and would else send home what its predecessor had grown."""
    process = world.leave_behind("m-0", scaled())
    await world.start(configuration(world.run_dir, scaled()))
    await world.clock.advance(4.0)
    assert (world.phases(), process.signals) == ({"m-0": "ready"}, [])
    await world.clock.advance(12.0)
    assert world.phases() == {"m-0": "asleep"}


async def test_an_operators_sleep_is_not_undone_until_there_is_demand(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled(scale="min: 0, max: 1")))
    await world.come_up()
    keeper = manager.keepers["m-0"]
    keeper.lower(Rung.ASLEEP, "an operator's wish")
    await world.clock.advance(0.9)
    assert keeper.state.phase is Phase.ASLEEP
    world.fetch.answers["/is_sleeping"] = AWAKE
    world.report(queued=2, arrived=2)
    await world.clock.advance(0.5)
    assert keeper.state.phase is Phase.READY


async def test_what_an_operator_drained_is_replaced_and_let_be(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled(scale="min: 1, max: 2")))
    await world.clock.advance(1.0)
    manager.keepers["m-0"].apply(Event.HOLD, "drained by an operator")
    await world.clock.advance(2.5)
    assert world.phases() == {"m-0": "held", "m-1": "ready"}


async def test_reload_raises_the_least_and_ends_scaling(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled()))
    manager.reload(configuration(world.run_dir, scaled(scale="min: 2, max: 4")))
    await world.clock.advance(1.0)
    assert world.phases() == {"m-0": "ready", "m-1": "ready"}
    manager.keepers["m-1"].lower(Rung.ASLEEP, "an operator's wish")
    await world.clock.advance(0.9)
    assert world.phases()["m-1"] in {"asleep", "ready"}, "or it has been needed already"
    world.fetch.answers["/is_sleeping"] = AWAKE
    fixed = "[{engine: simulator, target_inputs: 4, sleep: true, replicas: 2}]"
    manager.reload(configuration(world.run_dir, fixed))
    await world.clock.advance(2.0)
    assert world.phases() == {"m-0": "ready", "m-1": "ready"}, "what rested is woken"
    assert len(world.provider.spawned) == 2
    await world.clock.advance(60.0)
    assert world.phases() == {"m-0": "ready", "m-1": "ready"}, "nobody scales any more"


async def test_a_pool_at_nothing_that_a_reload_brings_is_told_of(world: Scaled) -> None:
    """No replica changes by it, and nobody can be held for a model that nobody has heard of."""
    none = configuration(world.run_dir, "[{engine: simulator, target_inputs: 4, replicas: 0}]")
    manager = await world.start(none)
    for config, wakes in ((configuration(world.run_dir, scaled()), True), (none, False)):
        manager.reload(config)
        await world.clock.advance(0.5)
        assert [pool.wakes for pool in manager.feed.snapshot.pools] == [wakes]
    assert manager.keepers == {}


async def test_a_start_that_keeps_failing_is_not_multiplied(world: Scaled) -> None:
    world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, scaled()))
    for _ in range(30):
        world.report(queued=4, arrived=1)
        for process in world.provider.spawned:
            if not process.exited.done():
                process.exit("exited with status 1")
        await world.clock.advance(0.5)
    assert set(world.phases()) == {"m-0"}
    assert len(world.provider.spawned) <= 4, "its back-off holds"


async def test_a_start_that_keeps_failing_ends_when_nobody_asks_any_more(world: Scaled) -> None:
    """It would hold its card again and again, and for nobody."""
    world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, scaled()))
    for queued in (4, 4, 4, 4, *[0] * 60):
        world.report(queued=queued, arrived=queued)
        for process in world.provider.spawned:
            if not process.exited.done():
                process.exit("exited with status 1")
        await world.clock.advance(0.5)
        assert bool(world.phases()) >= bool(queued)
    assert world.phases() == {}


async def test_a_rung_that_fails_is_left_out_and_the_next_one_taken(world: Scaled) -> None:
    """It balks at sleep, and so it ends instead of being asked again and again."""
    world.fetch.answers |= {"POST /sleep?level=1&mode=wait": Answer(500), "/is_sleeping": AWAKE}
    await world.start(configuration(world.run_dir, scaled(scale="min: 0, max: 1, rungs: [asleep]")))
    world.report(queued=1, arrived=1)
    await world.busy(1.0, in_flight=1)
    await world.busy(14.0)
    asked = [url for url in world.fetch.posted if "/sleep" in url]
    assert len(asked) == 1
    assert world.phases() == {"m-0": "stopping"}


async def test_two_models_take_turns_on_one_card(world: Scaled, tmp_path: Path) -> None:
    """The one that nobody asks for gives its card to the other."""
    inventory = GpuInventory((Gpu(device="0", uuid="GPU-0", name="x"),))
    world.cards = Cards(GpuLeases(inventory), Log(world.stream))
    scale = f"autoscale: {{max: 1, rungs: [cold], {WINDOWS}}}"
    pool = f"engine: simulator, target_inputs: 4, gpus: 1, {scale}"
    config = configuration(world.run_dir, f"[{{{pool}, name: one}}]")
    other = configuration(world.run_dir, f"[{{{pool}, name: two}}]").models[0]
    other = msgspec.structs.replace(other, name="n")
    await world.start(msgspec.structs.replace(config, models=(*config.models, other)))
    assert world.manager is not None

    def ask(model: str, sequence: int) -> None:
        assert world.manager is not None
        told = {model: ModelDemand(queued=1, arrivals_total=1)}
        world.manager.scaler.take(Demand(proxy_id="p", sequence=sequence, models=told))

    ask("m", 1)
    await world.clock.advance(0.5)
    assert world.phases() == {"one-0": "ready"}
    for sequence in range(2, 8):  # 3 s, less than it is kept for in case
        ask("n", sequence)
        await world.clock.advance(0.5)
        first = world.provider.spawned[0]
        if first.signals and not first.exited.done():
            first.exit("exited with status 0")
    assert world.phases() == {"two-0": "ready"}
    assert world.provider.spawned[1].env["CUDA_VISIBLE_DEVICES"] == "0"
    report = world.manager.scaler.report()
    assert (report.gpus.total, report.gpus.free) == (1, 0)
    assert report.gpus.holders == {"two-0": ("0",)}
    (told,) = [e for e in world.events() if e["event"] == "scaling" and "two-0 up" in str(e)]
    terms = told["terms"]
    assert isinstance(terms, dict)
    assert (terms["share"], terms["wants"]) == (1, 1), "of the arbiter"
    assert "need" in terms, "of the law"


async def test_one_on_its_way_out_is_called_back_when_it_is_needed_after_all(
    world: Scaled,
) -> None:
    pools = scaled(scale="min: 0, max: 4, rungs: [cold]")
    await world.start(configuration(world.run_dir, pools))
    await world.come_up()
    world.fetch.answers["/metrics"] = running(1)  # by itself it is busy: it drains for a while
    await world.busy(12.0)
    assert world.phases() == {"m-0": "draining"}
    world.report(queued=2, arrived=2)
    assert world.phases() == {"m-0": "ready"}
    assert len(world.provider.spawned) == 1
    assert world.provider.spawned[0].signals == []


async def test_offline_work_is_cut_when_an_online_model_needs_its_card(world: Scaled) -> None:
    inventory = GpuInventory((Gpu(device="0", uuid="GPU-0", name="x"),))
    world.cards = Cards(GpuLeases(inventory), Log(world.stream))
    scale = f"autoscale: {{max: 1, rungs: [cold], {WINDOWS}}}"
    pool = f"engine: simulator, target_inputs: 4, gpus: 1, {scale}"
    config = configuration(world.run_dir, f"[{{{pool}, class: offline}}]")
    chat = configuration(world.run_dir, f"[{{{pool}, name: chat}}]").models[0]
    chat = msgspec.structs.replace(chat, name="chat")
    manager = await world.start(msgspec.structs.replace(config, models=(*config.models, chat)))
    await world.come_up()
    world.fetch.answers["/metrics"] = running(3)
    await world.busy(6.0, in_flight=3, a_second=2)
    assert world.phases() == {"m-0": "ready"}
    told = {"m": ModelDemand(in_flight=3, arrivals_total=99), "chat": ModelDemand(queued=1)}
    manager.scaler.take(Demand(proxy_id="p", sequence=999, models=told))
    await world.clock.advance(0.1)
    assert world.phases() == {"m-0": "stopping"}, "its lines are asked again"
    assert manager.scaler.pools["chat"].waiting == "cards are being given up for it"
    world.provider.spawned[0].exit("exited with status 0")
    await world.clock.advance(0.5)
    assert world.phases()["chat-0"] in {"starting", "ready"}


async def test_a_start_of_offline_work_is_broken_off_for_an_online_model(world: Scaled) -> None:
    """Whoever waits for an answer would wait for that start, too."""
    inventory = GpuInventory((Gpu(device="0", uuid="GPU-0", name="x"),))
    world.cards = Cards(GpuLeases(inventory), Log(world.stream))
    scale = f"autoscale: {{max: 1, rungs: [cold], {WINDOWS}}}"
    pool = f"engine: simulator, target_inputs: 4, gpus: 1, {scale}"
    config = configuration(world.run_dir, f"[{{{pool}, class: offline}}]")
    chat = configuration(world.run_dir, f"[{{{pool}, name: chat}}]").models[0]
    chat = msgspec.structs.replace(chat, name="chat")
    manager = await world.start(msgspec.structs.replace(config, models=(*config.models, chat)))
    world.fetch.answers["/health"] = Answer(503)
    world.report(queued=1, arrived=1)
    await world.clock.advance(1.0)
    assert world.phases() == {"m-0": "starting"}
    told = {"m": ModelDemand(queued=1, arrivals_total=1), "chat": ModelDemand(queued=1)}
    manager.scaler.take(Demand(proxy_id="p", sequence=999, models=told))
    await world.clock.advance(0.1)
    assert world.phases() == {"m-0": "stopping"}
    world.provider.spawned[0].exit("exited with status 0")
    await world.clock.advance(0.5)
    assert world.phases()["chat-0"] == "starting"


async def test_one_whose_card_another_has_now_does_not_keep_a_new_one_from_a_free_card(
    world: Scaled,
) -> None:
    """A driver before 580 resumes where it suspended, and nowhere else."""
    inventory = GpuInventory(tuple(Gpu(device=n, uuid=f"GPU-{n}", name="x") for n in "01"))
    world.cards = Cards(GpuLeases(inventory), Log(world.stream))
    pools = scaled(scale="min: 0, max: 1, rungs: [suspended]", rest="gpus: 1")
    await world.start(configuration(world.run_dir, pools))
    await world.come_up()
    await world.busy(14.0)
    assert world.phases() == {"m-0": "suspended"}
    leases = world.cards.leases
    assert leases is not None
    leases.claim("stranger", ["0"])
    world.report(queued=1, arrived=1)
    await world.clock.advance(0.5)
    assert len(world.provider.spawned) == 2
    assert leases.holders["m-1"] == ("1",)


async def test_what_no_pool_wants_is_not_asked_whether_it_works(world: Scaled) -> None:
    """To find out whether images can be made here takes a second, in which nobody is served."""

    class Asked:
        works = False

        def probe(self) -> Capability:
            self.works = True
            return Capability(works=True)

    asked = Asked()
    world.snapshots = asked  # type: ignore[assignment]
    await world.start(configuration(world.run_dir, scaled()))
    assert not asked.works
    assert world.manager is not None
    world.manager.reload(configuration(world.run_dir, scaled(rest="snapshot: true")))
    assert asked.works


async def test_the_size_of_a_fixed_pool_can_be_set_until_the_next_reload(world: Scaled) -> None:
    fixed = "[{engine: simulator, target_inputs: 4, replicas: 1}]"
    manager = await world.start(configuration(world.run_dir, fixed))
    manager.scaler.set_replicas("m", 3)
    await world.clock.advance(0.5)
    assert set(world.phases()) == {"m-0", "m-1", "m-2"}
    manager.scaler.set_replicas("m", 2)
    assert world.phases()["m-2"] == "draining"
    manager.reload(configuration(world.run_dir, fixed))
    assert world.phases()["m-1"] == "draining"


async def test_stopping_scales_nothing(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled(scale="min: 1, max: 2")))
    await world.clock.advance(1.0)
    stopping = asyncio.ensure_future(manager.stop())
    await world.clock.advance(1.0)
    world.report(queued=5, arrived=5)
    world.provider.spawned[0].exit("exited with status 0")
    await world.clock.advance(2.0)
    assert stopping.done()
    assert len(world.provider.spawned) == 1


async def test_a_look_that_fails_is_followed_by_the_next(
    world: Scaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing would ever be scaled again, and nobody told."""
    manager = await world.start(configuration(world.run_dir, scaled()))

    def fail(_now_s: float) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(manager.scaler.book, "expire", fail)
        with pytest.raises(ZeroDivisionError):
            await world.clock.advance(TICK_S)
    told = Demand(proxy_id="p", sequence=1, models={"m": ModelDemand(queued=1)})
    manager.scaler.book.take(told, world.clock.now_s())
    await world.clock.advance(TICK_S)
    assert set(world.phases()) == {"m-0"}


async def test_what_another_region_asks_for_is_started_at_once(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled()))
    assert manager.feed.snapshot.pools[0].startable == 4
    assert manager.feed.snapshot.pools[0].carries == 4.0
    manager.scaler.take(Demand(proxy_id="p", sequence=1, wanted={"m": {"eu": 8.0}}))
    assert len(world.provider.spawned) == 2, "not at the next tick: now"
    await world.clock.advance(0.5)
    assert world.phases() == {"m-0": "ready", "m-1": "ready"}
    assert manager.feed.snapshot.pools[0].startable == 2


async def test_what_another_region_starts_sooner_is_not_started_here(world: Scaled) -> None:
    manager = await world.start(configuration(world.run_dir, scaled()))
    told = {"m": ModelDemand(queued=1, arrivals_total=1)}
    soon = Elsewhere(start_s=0.1, startable=4, carries=4.0)
    for sequence, offer in enumerate((soon, msgspec.structs.replace(soon, coming=1)), 1):
        demand = Demand(
            proxy_id="p", sequence=sequence, models=told, elsewhere={"m": {"us": offer}}
        )
        manager.scaler.take(demand)
        await world.clock.advance(TICK_S)
        assert world.provider.spawned == []
        assert manager.feed.snapshot.pools[0].wanted == {"us": 1.0}
    manager.scaler.take(Demand(proxy_id="p", sequence=3, models=told))
    assert len(world.provider.spawned) == 1, "the other one is not heard of: at once"
    assert manager.scaler.records()[0].wanted == {}


async def test_another_region_gets_what_the_cards_do_not_allow(world: Scaled) -> None:
    """One card, and a pool that needs two: the second replica is the other region's."""
    world.cards = Cards(
        GpuLeases(GpuInventory((Gpu(device="0", uuid="GPU-0", name="x"),))), Log(world.stream)
    )
    scale = f"autoscale: {{min: 2, max: 4, rungs: [cold], {WINDOWS}}}"
    pools = f"[{{engine: simulator, target_inputs: 4, gpus: 1, {scale}}}]"
    manager = await world.start(configuration(world.run_dir, pools))
    record = manager.feed.snapshot.pools[0]
    assert (len(world.provider.spawned), record.startable) == (1, 0)
    told = {"m": ModelDemand(queued=9, arrivals_total=9)}
    late = Elsewhere(start_s=90.0, startable=4, carries=4.0)
    for sequence in range(1, 4):
        manager.scaler.take(
            Demand(proxy_id="p", sequence=sequence, models=told, elsewhere={"m": {"us": late}})
        )
        await world.clock.advance(TICK_S)
    assert len(world.provider.spawned) == 1
    assert manager.feed.snapshot.pools[0].wanted.get("us", 0.0) > 0.0
