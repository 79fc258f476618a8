"""Pools of engine workers in a manager: over fake processes, with a clock that the test holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from backends.api import Api
from backends.cards import Cards
from backends.fetch import Answer
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.job_rates import Expectation, gpu_type
from backends.job_scaling import NEEDS_MAX, SERVICES_MAX, JobScaling, NeedsBook
from backends.log import Log
from backends.offline.work import NEEDS_AGE_S_MAX, JobNeed, JobNeeds
from backends.reclaim import Fate
from backends.scale_command import story
from backends.scaling_report import PoolReport
from backends.spec import pool_specs
from proxy.config import Config, parse_config
from proxy.contract.demand import Demand, ModelDemand
from tests.fakes.model_shapes import CONFIGS
from tests.fakes.world import World

DAY_S = 86_400.0
WINDOWS = "stable_window_secs: 10, panic_window_secs: 2, scaledown_window_secs: 20"
JOBS = "engine: simulator, serves: jobs, autoscale: {max: 3, scaledown_window_secs: 20}"


def page(running: int) -> Answer:
    text = f"doherty_worker_lines_running {running}\nvllm:num_requests_running {running}\n"
    return Answer(200, text.encode())


class Jobs(World):
    """A world with a service that tells what is left to do."""

    sequence = 0

    def configured(self, jobs: str = JOBS, more: str = "", offline: str = "{}") -> Config:
        return parse_config(
            f"manager: {{run_dir: '{self.run_dir}', restart_backoff_secs: 4}}\n"
            f"offline: {offline}\n"
            f"models: [{{name: m, pools: [{{{jobs}}}]}}{more}]",
            "test",
        )

    urls: dict[str, tuple[str, ...]] | None = None

    def tell(self, *needs: JobNeed, rates: dict[str, float] | None = None) -> None:
        assert self.manager is not None
        self.sequence += 1
        told = JobNeeds(
            service_id="s",
            sequence=self.sequence,
            models={"m": needs},
            rates=rates or {},
            urls=self.urls or {},
        )
        self.manager.scaler.take_needs(told)

    async def told_for(self, seconds: int, *needs: JobNeed, **rates: float) -> None:
        """Have the service say so each second, and what was told to end do so."""
        for _ in range(seconds):
            self.tell(*needs, rates={name.replace("m_", "m-"): r for name, r in rates.items()})
            await self.clock.advance(1.0)
            self.let_end()

    def let_end(self) -> None:
        for process in self.provider.spawned:
            if process.signals and not process.exited.done():
                process.exit("exited with status 0")

    def phases(self) -> dict[str, str]:
        assert self.manager is not None
        return {name: keeper.state.phase.value for name, keeper in self.manager.keepers.items()}

    def pool(self, pool_id: str = "m") -> PoolReport:
        assert self.manager is not None
        return next(p for p in self.manager.scaler.report().pools if p.pool == pool_id)


def need(tokens: int, due_in_s: float = DAY_S, lines: int = 10_000) -> JobNeed:
    return JobNeed(due_in_s=due_in_s, lines=lines, tokens=tokens)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Jobs]:
    world = Jobs(tmp_path)
    world.fetch.answers |= {"/metrics": page(0), "/v1/models": Answer(404)}
    yield world
    await world.close()


async def test_workers_come_with_the_work_and_go_to_zero_after_it(world: Jobs) -> None:
    manager = await world.start(world.configured())
    await world.told_for(5)
    assert world.phases() == {}
    world.fetch.answers["/metrics"] = page(200)
    await world.told_for(3, need(10_000_000))
    assert world.phases() == {"m-0": "ready"}, "a day is long: one will do"
    await world.told_for(3, need(10_000_000, 2500.0))
    await world.told_for(3, need(10_000_000, 2500.0))
    assert world.phases() == dict.fromkeys(["m-0", "m-1", "m-2"], "ready"), "this is due sooner"
    await world.told_for(3, need(1000, lines=40))
    assert set(world.phases().values()) == {"ready"}, "what they have begun they end"
    world.fetch.answers["/metrics"] = page(0)
    await world.told_for(3)
    assert set(world.phases().values()) == {"ready"}, "more may come"
    await world.told_for(12)
    assert world.phases() == {}
    assert [len(p.signals) for p in world.provider.spawned] == [1, 1, 1]
    assert manager.feed.snapshot.workers == ()


async def test_lines_that_no_worker_understands_keep_none_up(world: Jobs) -> None:
    await world.start(world.configured())
    embeddings = msgspec.structs.replace(need(10_000_000), url="/v1/embeddings")
    chats = msgspec.structs.replace(need(10_000_000), url="/v1/chat/completions")
    await world.told_for(3, embeddings)
    assert world.phases() == {"m-0": "ready"}, "nobody knows what the worker will understand"
    world.urls = {"m": ("/v1/chat/completions",), "other": ("/v1/embeddings",)}
    await world.told_for(20, embeddings)
    assert world.phases() == {}
    await world.told_for(3, embeddings, chats)
    assert world.phases() == {"m-0": "ready"}


async def test_proxies_hear_of_workers_only_as_such(world: Jobs) -> None:
    manager = await world.start(world.configured())
    await world.told_for(3, need(10_000_000))
    snapshot = manager.feed.snapshot
    assert snapshot.replicas == ()
    assert snapshot.pools == (), "nobody is held for a model that takes no requests"
    (worker,) = snapshot.workers
    assert (worker.replica_id, worker.engine, worker.models) == ("m-0", "simulator-jobs", ("m",))
    told = Demand(proxy_id="p", sequence=1, models={"m": ModelDemand(queued=9)})
    manager.scaler.take(told)
    await world.clock.advance(3.0)
    assert list(world.phases()) == ["m-0"], "requests ask for no workers"


async def test_a_worker_that_goes_is_not_waited_for(world: Jobs) -> None:
    """It gives back what it has not done, so a busy one gets its SIGTERM at once, too."""
    manager = await world.start(world.configured())
    world.fetch.answers["/metrics"] = page(200)
    await world.told_for(3, need(10_000_000))
    manager.reload(world.configured("engine: simulator, serves: jobs, replicas: 0"))
    await world.clock.advance(0.1)
    assert world.phases() == {"m-0": "stopping"}
    (process,) = world.provider.spawned
    assert len(process.signals) == 1


async def test_rates_are_learned_from_busy_workers_and_decide(world: Jobs) -> None:
    world.fetch.answers["/metrics"] = page(200)
    await world.start(world.configured())
    work = need(40_000_000, 20_000.0, lines=50_000)
    await world.told_for(3, work)
    assert len(world.phases()) == 2, "by the guess"
    assert world.pool().decision is not None
    await world.told_for(15, work, m_0=9000.0, m_1=11_000.0)
    decision = world.pool().decision
    assert decision is not None
    assert 9000 <= decision.terms["tokens_per_s"] <= 11_000
    assert decision.terms["rate_measured"] == 1.0
    assert decision.terms["needed"] == 2, "both are busy"
    assert "price_per_million_tokens" not in decision.terms
    await world.told_for(40, need(10, lines=3), m_0=1.0)
    learnt = world.pool().decision
    assert learnt is not None
    assert learnt.terms["tokens_per_s"] >= 9000, "who has next to nothing to do shows no rate"


async def test_spare_capacity_that_does_it_in_time_spares_a_worker(world: Jobs) -> None:
    chat = ", {engine: simulator, replicas: 1, target_inputs: 4, name: chat}"
    await world.start(world.configured(JOBS + "}" + chat.replace("}", "", 1)))
    await world.told_for(3, need(10_000_000), **{"spare-0:m": 9000.0})
    assert world.phases() == {"chat-0": "ready"}
    assert "spare capacity" in world.pool().decision.reason  # type: ignore[union-attr]
    await world.told_for(3, need(10_000_000, 3000.0), **{"spare-0:m": 100.0})
    assert world.phases()["m-0"] == "ready"


async def test_a_silent_service_sends_workers_home_and_a_new_manager_does_not(
    world: Jobs, tmp_path: Path
) -> None:
    await world.start(world.configured())
    await world.told_for(3, need(10_000_000))
    for _ in range(int(NEEDS_AGE_S_MAX) + 8):
        await world.clock.advance(1.0)
        world.let_end()
    assert world.phases() == {}, "nobody gives out lines"
    (tmp_path / "after").mkdir()
    after = Jobs(tmp_path / "after")
    after.fetch.answers |= {"/metrics": page(9), "/v1/models": Answer(404)}
    after.leave_behind("m-0", f"[{{{JOBS}}}]")
    await after.start(after.configured())
    await after.clock.advance(NEEDS_AGE_S_MAX - 2.0)
    assert after.phases() == {"m-0": "ready"}
    assert "no service has said" in after.pool().decision.reason  # type: ignore[union-attr]
    await after.told_for(3, need(10_000_000))
    assert after.phases() == {"m-0": "ready"}
    assert after.provider.spawned == []
    await after.close()


def one_card(world: Jobs, cards: int = 1) -> None:
    gpus = tuple(Gpu(device=str(n), uuid=f"GPU-{n}", name="x") for n in range(cards))
    world.cards = Cards(GpuLeases(GpuInventory(gpus)), Log(world.stream))


def chat(work_class: str = "online") -> str:
    scale = f"autoscale: {{max: 1, rungs: [cold], {WINDOWS}}}, class: {work_class}"
    pool = f"engine: simulator, target_inputs: 4, gpus: 1, {scale}, name: chat"
    return f", {{name: chat, pools: [{{{pool}}}]}}"


async def test_an_online_burst_takes_their_cards_and_they_come_back_after(world: Jobs) -> None:
    one_card(world)
    manager = await world.start(world.configured(JOBS + ", gpus: 1", chat()))
    work = need(10_000_000)
    world.fetch.answers["/metrics"] = page(200)
    await world.told_for(3, work)
    assert world.phases() == {"m-0": "ready"}
    manager.scaler.take(Demand(proxy_id="p", sequence=1, models={"chat": ModelDemand(queued=2)}))
    await world.clock.advance(0.1)
    assert world.phases() == {"m-0": "stopping"}, "at once: its lines go back"
    world.let_end()
    await world.clock.advance(0.5)
    assert world.phases().get("chat-0") in {"starting", "ready"}
    world.fetch.answers["/metrics"] = page(0)
    for sequence in range(2, 60):
        told = Demand(proxy_id="p", sequence=sequence, models={"chat": ModelDemand()})
        manager.scaler.take(told)
        await world.told_for(1, work)
    assert set(world.phases()) == {"m-0"}, "nobody chats any more"


async def test_a_deadline_that_presses_goes_before_semi_online_work(world: Jobs) -> None:
    one_card(world, cards=2)
    batch = chat("semi-online").replace("max: 1", "max: 2, min: 0")
    manager = await world.start(world.configured(JOBS + ", gpus: 1", batch))
    world.fetch.answers["/metrics"] = page(200)

    async def hour(work: JobNeed, sequence: int) -> None:
        for step in range(40):
            told = {"chat": ModelDemand(queued=9, in_flight=99, arrivals_total=step * 40)}
            report = Demand(proxy_id="p", sequence=sequence + step, models=told)
            manager.scaler.take(report)
            await world.told_for(1, work)

    await hour(need(10_000_000), 1)
    assert set(world.phases()) == {"chat-0", "chat-1"}
    assert not world.pool().presses
    assert "GPU" in world.pool().waiting
    await hour(need(10_000_000, 3300.0), 100)
    assert set(world.phases()) & {"m-0", "m-1", "m-2"}, "it has its share of the cards now"
    assert world.pool().presses
    assert "goes before offline work" in story(world.pool())
    assert "pressure" in story(world.pool())


async def test_a_pool_of_a_fixed_size_keeps_it_and_counts(world: Jobs) -> None:
    fixed = "engine: simulator, serves: jobs, replicas: 1, name: kept}, {" + JOBS
    await world.start(world.configured(fixed))
    await world.told_for(3)
    assert world.phases() == {"kept-0": "ready"}
    await world.told_for(3, need(10_000_000))
    assert world.phases() == {"kept-0": "ready"}, "it is there already"
    await world.told_for(3, need(10_000_000, 3000.0))
    assert set(world.phases()) == {"kept-0", "m-0", "m-1"}


async def test_workers_whose_starts_fail_make_room_for_those_of_another_pool(world: Jobs) -> None:
    jobs = JOBS + ", gpu_price_per_hour: 1, name: cheap}, {" + JOBS + ", gpu_price_per_hour: 2"
    await world.start(world.configured(jobs, offline="{price_per_hour_max: 10}"))
    world.fetch.answers["/health"] = Answer(503)
    for _ in range(12):
        world.tell(need(10_000_000))
        await world.clock.advance(1.0)
        for process in world.provider.spawned:
            if not process.exited.done() and "cheap-0" in process.argv:
                process.exit("exited with status 1")
    assert "m-0" in world.phases(), world.phases()
    assert world.pool("m").decision.terms["price_per_million_tokens"] == pytest.approx(  # type: ignore[union-attr]
        2 / 3600 / 2000 * 1e6
    )


async def test_a_card_that_is_taken_away_sends_the_lines_back_and_another_worker_comes(
    world: Jobs,
) -> None:
    one_card(world, cards=2)
    manager = await world.start(world.configured(JOBS + ", gpus: 1"))
    world.fetch.answers["/metrics"] = page(200)
    work = need(10_000_000)
    await world.told_for(3, work)
    assert world.phases() == {"m-0": "ready"}
    (first,) = world.provider.spawned
    manager.reclaims.take(120.0, [first.env["CUDA_VISIBLE_DEVICES"]], "a test")
    await world.clock.advance(0.1)
    (told,) = [e for e in world.events() if e["event"] == "reclaim"]
    assert (told["replica"], told["fate"]) == ("m-0", Fate.IS_REQUEUED)
    assert len(first.signals) == 1, "at once: its lines go to others"
    world.let_end()
    await world.told_for(5, work)
    second = world.provider.spawned[-1]
    assert second.env["CUDA_VISIBLE_DEVICES"] != first.env["CUDA_VISIBLE_DEVICES"]
    assert "ready" in world.phases().values()


async def test_an_operator_restarts_a_worker_and_nothing_else(world: Jobs) -> None:
    manager = await world.start(world.configured())
    await world.told_for(3, need(10_000_000))
    runner = web.AppRunner(Api(manager).application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    url = f"http://{host}:{port}/v1/replicas/m-0/"
    async with aiohttp.ClientSession() as session:
        for wish in ("drain", "sleep?rung=suspended", "snapshot"):
            async with session.post(url + wish) as answer:
                assert answer.status == 409
                assert "takes no requests" in await answer.text()
        assert world.phases() == {"m-0": "ready"}
        async with session.get(f"http://{host}:{port}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        assert 'doherty_manager_engine_workers{state="ready"} 1.0' in lines
        assert 'doherty_manager_replicas{state="ready"} 0.0' in lines
        assert 'doherty_manager_scale_term{pool="m",term="needed"} 1.0' in lines
        async with session.post(url + "restart") as answer:
            assert answer.status == 200
        await world.clock.advance(0.1)
        assert world.phases() == {"m-0": "stopping"}, "it is not waited for"
    await runner.cleanup()


async def test_a_pool_that_changes_what_it_serves_is_made_anew_one_at_a_time(world: Jobs) -> None:
    """What keeps a replica kept its first engine, and started that again and again."""
    manager = await world.start(world.configured("engine: simulator, replicas: 2"))
    before = list(world.provider.spawned)
    manager.reload(world.configured("engine: simulator, serves: jobs, replicas: 2"))
    await world.clock.advance(1.0)
    assert sorted(world.phases().values()) == ["ready", "stopping"]
    for _ in range(12):
        world.let_end()
        await world.clock.advance(1.0)
    assert world.phases() == {"m-0": "ready", "m-1": "ready"}
    assert [worker.engine for worker in manager.feed.snapshot.workers] == ["simulator-jobs"] * 2
    assert manager.feed.snapshot.replicas == ()
    assert len(world.provider.spawned) == 4
    assert all(process.exited.done() for process in before)


async def test_what_was_started_as_another_engine_is_adopted_as_that(world: Jobs) -> None:
    """A worker that a proxy takes for a replica would answer requests with 404."""
    process = world.leave_behind("m-0", f"[{{{JOBS}}}]")
    manager = await world.start(world.configured("engine: simulator, replicas: 1"))
    assert manager.feed.snapshot.replicas == ()
    assert process.signals, "the configuration wants a replica in its place"
    process.exit("exited with status 0")
    await world.clock.advance(2.0)
    (replica,) = manager.feed.snapshot.replicas
    assert (replica.engine, replica.state.value) == ("simulator", "ready")


def test_the_newest_report_is_what_is_left_and_rates_of_services_add_up() -> None:
    book = NeedsBook()

    def told(service: str, sequence: int, tokens: int, **rates: float) -> JobNeeds:
        models = {"m": (need(tokens, 9.0), need(1, 5.0))}
        return JobNeeds(service_id=service, sequence=sequence, models=models, rates=rates)

    assert book.take(told("a", 2, 100, w=5.0), 1.0)
    assert not book.take(told("a", 2, 999), 1.5), "an older one is no news"
    assert book.take(told("b", 1, 90, w=2.0), 2.0)
    assert [each.tokens for each in book.of("m")] == [1, 90]
    assert book.rate("w") == 7.0
    assert book.of("other") == ()
    assert [each.tokens for each in book.of("other", "m")] == [1, 90], "an adapter of the other"
    book.expire(1.5 + NEEDS_AGE_S_MAX)
    assert book.rate("w") == 2.0
    book.expire(3.0 + NEEDS_AGE_S_MAX)
    assert (book.told, book.of("m")) == (False, ())


def test_reports_and_needs_are_bounded() -> None:
    book = NeedsBook()
    for number in range(SERVICES_MAX):
        assert book.take(JobNeeds(service_id=str(number), sequence=1), 1.0)
    assert not book.take(JobNeeds(service_id="one more", sequence=1), 1.0)
    many = tuple(need(10, float(due), lines=1) for due in range(NEEDS_MAX * 2))
    book.take(JobNeeds(service_id="0", sequence=2, models={"m": many}), 2.0)
    kept = book.of("m")
    assert len(kept) == NEEDS_MAX
    assert sum(each.tokens for each in kept) == 10 * len(many)
    assert kept[-1].due_in_s == NEEDS_MAX - 1, "none is taken to be due later than it is"
    assert msgspec.json.decode(msgspec.json.encode(kept[-1]), type=JobNeed) == kept[-1]


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("A100", "a100"),
        ("NVIDIA L4", None),
    ],
)
def test_cards_are_known_by_what_they_call_themselves(card: str, found: str | None) -> None:
    gpu = gpu_type(card)
    assert (gpu.name if gpu else None) == found


def test_before_any_rate_is_measured_the_planner_has_one(tmp_path: Path, world: Jobs) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-3.1-8b"]))
    cards = tuple(Gpu(device=str(n), uuid=f"GPU-{n}", name="NVIDIA H200") for n in range(2))
    expect = Expectation(Cards(GpuLeases(GpuInventory(cards)), Log(world.stream)))
    text = (
        f"models: [{{name: m, pools: [{{engine: vllm, serves: jobs, model_path: '{tmp_path}'}}]}}]"
    )
    spec = pool_specs(parse_config(text, "test"))[0].first
    rate = expect(spec, 1)
    assert rate is not None
    assert 10_000 < rate < 100_000, "of prompts and answers"
    assert expect(spec, 2) == 2 * rate
    there = msgspec.structs.replace(spec, resources={"accelerator_type:A100": 0.001})
    slower = expect(there, 1)
    assert slower is not None
    assert slower < rate
    unknown = msgspec.structs.replace(spec, model_path=str(tmp_path / "away"))
    assert expect(unknown, 1) is None
    assert expect(msgspec.structs.replace(spec, engine="simulator-jobs"), 1) is None


async def test_what_the_planner_expects_decides_until_workers_show_more(world: Jobs) -> None:
    manager = await world.start(world.configured())
    manager.scaler.jobs = JobScaling(world.clock.now_s(), lambda _spec, _gpus: 7777.0)
    await world.told_for(2, need(10_000_000))
    decision = world.pool().decision
    assert decision is not None
    assert (decision.terms["tokens_per_s"], decision.terms["rate_measured"]) == (7777.0, 0.0)
    assert "shown its rate" in decision.reason
