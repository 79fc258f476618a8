"""Lines of jobs on what is spare: a real store, a real proxy, real sockets, engines on a script."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.clock import SystemClock
from backends.log import Log
from backends.offline import answers, dispatch, gate, sender
from backends.offline.dispatch import Dispatcher
from backends.offline.records import Limits
from backends.offline.store import Store
from backends.offline.work import Ask, JobNeeds, Line, Report
from backends.scaling_report import DemandReport, ModelReport
from backends.tasks import cancel_all, spawn
from proxy.config import Config
from proxy.contract import LoadSample, ReplicaRecord
from proxy.contract.demand import ModelDemand
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json
from tests.fakes.plane import RealPlane, until
from tests.fakes.stored_jobs import ANN, chat_job, outcomes
from tests.fakes.told_manager import ToldManager

KEY = "a-key-of-the-region"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often: the windows of the gate stay as they are."""
    monkeypatch.setattr(dispatch, "LOOK_S", 0.02)
    monkeypatch.setattr(dispatch, "NEEDS_S", 0.05)
    monkeypatch.setattr(sender, "REPORT_S", 0.02)
    monkeypatch.setattr(gate, "PRESSED_HOLD_S", 0.05)
    monkeypatch.setattr(gate, "BURST_HOLD_S", 0.1)
    monkeypatch.setattr(answers, "WAIT_S_MIN", 0.01)
    monkeypatch.setattr(answers, "WAIT_FULL_S", 0.02)


class Region:
    """One model on one engine, a proxy in front of it, and a manager that says what a test says."""

    def __init__(self, store: Store, engine: ScriptedEngine, manager: ToldManager) -> None:
        self.store, self.engine, self.manager = store, engine, manager
        self.log = io.StringIO()
        self.proxy: RealPlane
        self.dispatcher: Dispatcher
        self._readings = 0

    def make(self, config: Config | None = None, desk: Any = None) -> Dispatcher:
        return Dispatcher(
            desk or self.store,
            self.needs,
            config or msgspec.convert({"offline": {"spare_inputs_max": 16}}, Config),
            proxy_url=f"http://127.0.0.1:{self.proxy.port}",
            manager_url=self.manager.url,
            api_key=KEY,
            clock=SystemClock(),
            log=Log(self.log),
        )

    @property
    def chunks_held(self) -> int:
        return sum(len(each.sender._chunks) for each in self.dispatcher._served.values())

    async def needs(self, _: float) -> JobNeeds:
        return JobNeeds(service_id="s", sequence=0, models=await self.store.needs())

    async def tell(self, *, panicking: bool = False, **demand: int) -> None:
        self.manager.asked = DemandReport(
            proxies=1,
            models={"m": ModelReport(demand=ModelDemand(**demand), panicking=panicking)},
        )
        seen = self.manager.asked_times
        await until(lambda: self.manager.asked_times > seen + 1)

    async def publish(self, **fields: Any) -> None:
        self._readings += 1
        load = LoadSample(at_s=float(self._readings))
        record = ReplicaRecord(
            replica_id="m-0", url=self.engine.url, models=("m",), pool="m", load=load, **fields
        )
        await self.manager.publish(record)

    async def keep_reading(self) -> None:
        """Have new readings of the engine come, as a manager has."""
        while True:
            await self.publish()
            await asyncio.sleep(0.02)


@asynccontextmanager
async def region(tmp_path: Path, script: Any, *, start: bool = True) -> AsyncIterator[Region]:
    limits = Limits(hold_s=1.0)
    store = await Store.open(tmp_path / "offline.db", limits=limits)
    try:
        async with ScriptedEngine(script) as engine, ToldManager() as manager:
            made = Region(store, engine, manager)
            async with RealPlane([engine.record("m-0")], api_key=KEY) as made.proxy:
                made.dispatcher = made.make()
                reading = spawn(made.keep_reading(), "readings", Log(made.log))
                if start:
                    made.dispatcher.start()
                try:
                    yield made
                finally:
                    await made.dispatcher.close()
                    await cancel_all([reading])
    finally:
        await store.close()


def answered(request: Received) -> bytes:
    content = json.loads(request.body)["messages"][0]["content"]
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return json.dumps({"object": "chat.completion", "echo": content, "usage": usage}).encode()


async def echo(connection: Connection, request: Received) -> None:
    await answer_json(connection, answered(request))


async def test_lines_of_tenants_go_on_their_behalf(tmp_path: Path) -> None:
    """As the proxy hears it: the secret of the two as the key, and whose line it is."""
    seen: list[Received] = []

    async def hear(connection: Connection, request: Received) -> None:
        seen.append(request)
        await answer_json(connection, b"{}")

    async with ScriptedEngine(hear) as engine:
        post = dispatch._Post(f"http://127.0.0.1:{engine.port}", KEY, "internal")
        plain = dispatch._Post(f"http://127.0.0.1:{engine.port}", KEY)
        line = Line("j", 0, "/v1/chat/completions", msgspec.Raw(b"{}"), tenant="acme & co")
        await post(line, "spare")
        await post(msgspec.structs.replace(line, tenant=""), "spare")
        await plain(line, "spare")
        await post.close()
        await plain.close()
    told = [(r.fields["authorization"], r.fields.get("x-doherty-tenant")) for r in seen]
    assert told == [
        ("Bearer internal", "acme%20%26%20co"),
        ("Bearer internal", None),
        (f"Bearer {KEY}", None),
    ]


async def ended(store: Store, job_id: str, count: int) -> None:
    async with asyncio.timeout(20):
        while (job := await store.job(ANN, job_id)).completed + job.failed < count:
            await asyncio.sleep(0.02)


async def refuse(connection: Connection, status: int, code: str, more: bytes = b"") -> None:
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    await connection.send(
        b"HTTP/1.1 %d No\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b"
        % (status, more, len(body), body)
    )


async def test_a_job_is_done_line_by_line_with_bodies_as_they_came(tmp_path: Path) -> None:
    async with region(tmp_path, echo) as made:
        job = await chat_job(made.store, 120, fields={"temperature": 0, "x": "\u00e9"})
        await ended(made.store, job.id, 120)
        times, results = await outcomes(made.store, job.id)
        assert len(times) == 120
        assert set(times.values()) == {1}
        for each in results:
            number = each["custom_id"].removeprefix("c")
            assert each["response"]["status_code"] == 200
            assert each["response"]["body"]["echo"] == f"line {number}"
            assert each["response"]["request_id"]
        assert all(b'"temperature": 0, "x": "\\u00e9"}' in r.body for r in made.engine.requests)
        assert not any("x-doherty-class" in r.fields for r in made.engine.requests)
        done = await made.store.job(ANN, job.id)
        assert (done.completed, done.failed) == (120, 0)
        assert (done.prompt_tokens, done.completion_tokens) == (840, 360)
        (report,) = made.dispatcher.reports()
        # Where a hold ran out, which the job does not show, a second answer is counted here, too.
        assert report.counts.results >= 120
        assert report.in_flight == report.in_hand == 0


async def test_what_a_replica_does_not_understand_is_the_error_of_the_line(tmp_path: Path) -> None:
    async def unknown_path(connection: Connection, request: Received) -> None:
        if b"line 1" in request.body:
            await refuse(connection, 400, "unsupported")
        else:
            head = b"HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\n"
            await connection.send(head + b'content-length: 22\r\n\r\n{"detail":"Not Found"}')

    async with region(tmp_path, unknown_path) as made:
        job = await chat_job(made.store, 2, url="/v1/embeddings")
        await ended(made.store, job.id, 2)
        _, results = await outcomes(made.store, job.id)
        by_id = {each["custom_id"]: each["response"] for each in results}
        assert {name: each["status_code"] for name, each in by_id.items()} == {
            "c0": 404,
            "c1": 400,
        }
        assert by_id["c0"]["body"]["error"]["message"] == "Not Found"
        assert len(made.engine.requests) == 2, "asking again would bring the same"
        assert made.dispatcher.serves("m")
        assert not made.dispatcher.serves("other")


async def test_a_burst_ends_all_lines_at_once_and_they_are_done_later(tmp_path: Path) -> None:
    free = asyncio.Event()

    async def slow(connection: Connection, request: Received) -> None:
        await free.wait()
        await echo(connection, request)

    async with region(tmp_path, slow) as made:
        job = await chat_job(made.store, 30)
        await until(lambda: len(made.engine.requests) >= 16)
        await made.tell(panicking=True)
        await until(lambda: not made.proxy.plane.upstreams.open_count)
        (report,) = made.dispatcher.reports()
        assert (report.lines_max, report.in_flight, report.reason) == (0, 0, "burst")
        await until(lambda: not made.chunks_held)
        waiting = await made.store.ask(
            Ask(worker_id="other", models=("m",), urls=sender.URLS, lines_max=100)
        )
        assert waiting is not None
        assert len(waiting.lines) == 30, "others may have them all at once"
        await made.store.report(
            Report(worker_id="other", chunk_id=waiting.chunk_id, fence=waiting.fence, done=True)
        )
        free.set()
        await made.tell()
        await ended(made.store, job.id, 30)
        times, results = await outcomes(made.store, job.id)
        assert len(times) == 30
        assert set(times.values()) == {1}
        assert all(each["error"] is None for each in results)


async def test_what_says_nothing_of_a_line_costs_it_nothing(tmp_path: Path) -> None:
    tried: dict[bytes, int] = {}

    async def moody(connection: Connection, request: Received) -> None:
        count = tried[request.body] = tried.get(request.body, 0) + 1
        if b"line 1 " in request.body.replace(b'"', b" ") and count < 7:
            await refuse(connection, 503, "preempted")
        elif count == 1 and b"line 3" in request.body:
            await refuse(connection, 500, "internal_error")
        elif count == 1 and b"line 4" in request.body:
            await refuse(connection, 429, "too_many_requests", b"retry-after: 0\r\n")
        else:
            await echo(connection, request)

    async with region(tmp_path, moody) as made:
        job = await chat_job(made.store, 6)
        await ended(made.store, job.id, 6)
        times, results = await outcomes(made.store, job.id)
        assert set(times.values()) == {1}
        assert all(each["response"]["status_code"] == 200 for each in results), results


async def test_a_wrong_request_and_one_that_always_fails_have_their_errors(tmp_path: Path) -> None:
    async def judge(connection: Connection, request: Received) -> None:
        if b"line 0" in request.body:
            await refuse(connection, 400, "context_length_exceeded")
        elif b"line 2" in request.body:
            await refuse(connection, 500, "internal_error")
        else:
            await echo(connection, request)

    async with region(tmp_path, judge) as made:
        job = await chat_job(made.store, 4)
        await ended(made.store, job.id, 4)
        _, results = await outcomes(made.store, job.id)
        by_id = {each["custom_id"]: each for each in results}
        wrong = by_id["c0"]["response"]
        assert wrong["status_code"] == 400
        assert wrong["body"]["error"]["code"] == "context_length_exceeded"
        assert by_id["c1"]["response"]["status_code"] == 200
        assert by_id["c2"]["response"]["status_code"] == 500
        assert by_id["c3"]["response"]["status_code"] == 200
        done = await made.store.job(ANN, job.id)
        assert (done.completed, done.failed) == (2, 2)
        tries = [b"line 2" in request.body for request in made.engine.requests]
        assert sum(tries) == answers.FAILURES_MAX


async def test_a_line_over_which_the_sender_itself_fails_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(line: Line, answered: answers.Answered, failures: int) -> Any:
        if line.number == 3 and answered.status == 200:
            raise ValueError("odd")
        return answers.judge(line, answered, failures)

    monkeypatch.setattr(sender, "judge", judge)
    async with region(tmp_path, echo) as made:
        job = await chat_job(made.store, 8)
        await ended(made.store, job.id, 8)
        _, results = await outcomes(made.store, job.id)
        (bad,) = [each for each in results if each["error"]]
        assert bad["custom_id"] == "c3"
        assert bad["error"]["code"] == "no_answer"
        assert "ValueError: odd" in bad["error"]["message"]


async def test_a_killed_dispatcher_loses_and_doubles_nothing(tmp_path: Path) -> None:
    stall = True

    async def script(connection: Connection, request: Received) -> None:
        if stall and b"7" in request.body:
            await asyncio.sleep(60)
        await echo(connection, request)

    async with region(tmp_path, script) as made:
        job = await chat_job(made.store, 60)
        await until(lambda: made.dispatcher.reports()[0].counts.results > 20)

        class Dead:
            async def report(self, _: object) -> object:
                raise OSError("killed")

        for served in made.dispatcher._served.values():
            served.sender._desk = Dead()  # type: ignore[assignment]
        await made.dispatcher.close()
        stall = False
        made.dispatcher = made.make()
        made.dispatcher.start()
        await ended(made.store, job.id, 60)
        times, results = await outcomes(made.store, job.id)
        assert len(times) == 60
        assert set(times.values()) == {1}
        assert all(each["response"]["status_code"] == 200 for each in results)


async def test_an_orderly_end_gives_everything_back_at_once(tmp_path: Path) -> None:
    async def never(_: Connection, __: Received) -> None:
        await asyncio.sleep(60)

    async with region(tmp_path, never) as made:
        await chat_job(made.store, 40)
        await until(lambda: len(made.engine.requests) >= 4)
        await made.dispatcher.close()
        chunk = await made.store.ask(
            Ask(worker_id="w", models=("m",), urls=sender.URLS, lines_max=100)
        )
        assert chunk is not None
        assert len(chunk.lines) == 40


async def test_a_cancelled_job_ends_its_lines_in_flight(tmp_path: Path) -> None:
    async def never(_: Connection, __: Received) -> None:
        await asyncio.sleep(60)

    async with region(tmp_path, never) as made:
        job = await chat_job(made.store, 40)
        await until(lambda: len(made.engine.requests) >= 4)
        await made.store.cancel_job(ANN, job.id)
        await until(lambda: made.dispatcher.reports()[0].in_hand == 0)
        await until(lambda: not made.proxy.plane.upstreams.open_count)


async def test_a_late_job_moves_up_unless_workers_do_its_model(tmp_path: Path) -> None:
    classes: list[str] = []

    async with region(tmp_path, echo, start=False) as made:
        post = dispatch._Post.__call__

        async def seen(self: Any, line: Any, work_class: str) -> Any:
            classes.append(work_class)
            return await post(self, line, work_class)

        workers = {"engine": "simulator", "serves": "jobs", "autoscale": {"max": 1}}
        models = [{"name": "m", "pools": [{"engine": "simulator"}, {**workers, "name": "w"}]}]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch._Post, "__call__", seen)
            job = await chat_job(made.store, 20, window_s=0.9)
            made.dispatcher = made.make(msgspec.convert({"models": models}, Config))
            made.dispatcher.start()
            await until(lambda: len(classes) >= 1)
            assert not made.dispatcher.moved_up("m")
            await made.dispatcher.close()
            assert set(classes) == {"spare"}
            classes.clear()
            late = await chat_job(made.store, 200, window_s=4.0)
            made.dispatcher = made.make()
            made.dispatcher.start()
            await until(lambda: "semi-online" in classes)
            assert made.dispatcher.moved_up("m")
            await until(lambda: "lines_moved_up" in made.log.getvalue())
            await ended(made.store, late.id, 200)
            await until(lambda: not made.dispatcher.moved_up("m"))
        assert (await made.store.job(ANN, job.id)).completed <= 20


async def test_a_key_that_is_refused_stops_everything_and_errs_nobody(tmp_path: Path) -> None:
    async with region(tmp_path, echo, start=False) as made:
        job = await chat_job(made.store, 5)
        made.dispatcher = Dispatcher(
            made.store,
            made.needs,
            Config(),
            proxy_url=f"http://127.0.0.1:{made.proxy.port}",
            manager_url=made.manager.url,
            api_key="another",
            clock=SystemClock(),
            log=Log(made.log),
        )
        made.dispatcher.start()
        await until(lambda: "lines_refused" in made.log.getvalue())
        await asyncio.sleep(0.1)
        assert made.engine.requests == []
        assert (await made.store.job(ANN, job.id)).failed == 0
