"""The storm: how an answer is judged, what the weather is, and a small storm from end to end."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from loadtest import storm
from loadtest.__main__ import main
from loadtest.run import RunError
from loadtest.scripted_engine import Connection, Engine
from loadtest.scripts import (
    Journal,
    Order,
    Script,
    answer_head,
    event,
    pieces,
    whole_body,
)
from loadtest.storm.caller import Caller, Ending, call
from loadtest.storm.ledger import (
    BROKEN,
    OUTCOMES,
    Seen,
    Strike,
    Strikes,
    Tally,
    TokenReader,
    direct_latencies,
    judge,
    outcome,
)
from loadtest.storm.load import draw_script, render, request_body, script_text
from loadtest.storm.report import Options, Result, complaints, percentile, table
from loadtest.storm.scenarios import POINTS, Back, Delivery, Stall, expected
from loadtest.storm.stage import descriptor_count, free_ports, read_metrics, stage
from loadtest.storm.weather import KINDS, draw_faults
from loadtest.wire import AnswerReader

SCRIPT = Script(token="t1", events=4)
DONE = b"data: [DONE]\n\n"
RETRY = b"HTTP/1.1 502 -\r\nx-should-retry: true\r\ncontent-length: 0\r\n\r\n"


def stream(*events: bytes, script: Script = SCRIPT) -> bytes:
    return answer_head(msgspec.structs.replace(script, framing="close"), 0) + b"".join(
        one if one.endswith(b"\n\n") else one + b"\n\n" for one in events
    )


def seen(octets: bytes, ending: Ending = Ending.WHOLE, script: Script = SCRIPT) -> Seen:
    reader = TokenReader(script)
    reader.feed(octets, 2.0)
    return Seen(script=script, reader=reader, begun_s=1.0, ended_s=3.0, ending=ending)


EVENTS = [event(SCRIPT, index) for index in range(4)]
FOREIGN = event(Script(token="t2"), 1)


@pytest.mark.parametrize(
    ("octets", "ending", "word"),
    [
        (stream(*EVENTS, DONE), Ending.WHOLE, "complete"),
        (stream(*EVENTS), Ending.WHOLE, "silent"),
        (stream(*EVENTS[:3], DONE), Ending.WHOLE, "silent"),
        (stream(*EVENTS[:3]), Ending.CLOSED, "cut: close"),
        (stream(*EVENTS[:3]), Ending.RESET, "cut: close"),
        (stream(*EVENTS, DONE), Ending.RESET, "cut: close"),  # HTTP did not say that this is all
        (stream(*EVENTS[:2], b'data: {"error":{"message":"x"}}'), Ending.CLOSED, "cut: event"),
        (stream(EVENTS[0], FOREIGN, *EVENTS[2:], DONE), Ending.WHOLE, "mixed"),
        (stream(*EVENTS[:2], *EVENTS[1:], DONE), Ending.WHOLE, "duplicated"),
        (stream(*EVENTS, DONE, EVENTS[3]), Ending.WHOLE, "duplicated"),
        (stream(EVENTS[0], EVENTS[2], EVENTS[3], DONE), Ending.WHOLE, "reordered"),
        (stream(EVENTS[0], EVENTS[1] + b" ", *EVENTS[2:], DONE), Ending.WHOLE, "spoiled"),
        (stream(*EVENTS[:2]), Ending.NEVER, "lost"),
        (stream(*EVENTS[:2]), Ending.GARBLED, "mixed"),
        (RETRY, Ending.WHOLE, "failed"),
        (RETRY, Ending.CLOSED, "lost"),
        (RETRY.replace(b"true", b"false"), Ending.WHOLE, "lost"),
        (RETRY.replace(b"502", b"503"), Ending.WHOLE, "lost"),
        (b"", Ending.CLOSED, "lost"),
    ],
)
def test_what_became_of_a_stream(octets: bytes, ending: Ending, word: str) -> None:
    assert outcome(seen(octets, ending))[0] == word


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (whole_body(SCRIPT), "complete"),
        (whole_body(SCRIPT)[:-1], "silent"),
        (whole_body(SCRIPT) + b" ", "spoiled"),
        (whole_body(msgspec.structs.replace(SCRIPT, token="t2")), "mixed"),
    ],
)
def test_what_became_of_a_whole_answer(body: bytes, word: str) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    script = msgspec.structs.replace(SCRIPT, stream=False)
    assert outcome(seen(head + body, script=script))[0] == word


def test_an_end_that_no_fault_explains_is_a_loss() -> None:
    head = b"HTTP/1.1 200 OK\r\nx-doherty-replica: a\r\ncontent-type: text/event-stream\r\n\r\n"

    def tally(strikes: Strikes) -> Tally:
        cut = seen(head + EVENTS[0] + b"\n\n", Ending.CLOSED)
        return judge([cut], strikes, {}, 0)

    assert tally(Strikes()).counts["lost"] == 1
    for strikes in (
        Strikes(requests={"t1": Strike(2.5, "reset")}),
        Strikes(replicas={"a": [Strike(0.1, "kill"), Strike(2.5, "kill")]}),
    ):
        told = tally(strikes)
        assert told.counts["cut: close"] == 1
        assert sum(told.counts.values()) == 1
        assert [*told.latencies_s.values()] == [[0.5]]
    # Somebody else's fault, or one of another time, explains nothing.
    assert tally(Strikes(requests={"t2": Strike(2.5, "reset")})).counts["lost"] == 1
    assert tally(Strikes(replicas={"b": [Strike(2.5, "kill")]})).counts["lost"] == 1
    assert tally(Strikes(replicas={"a": [Strike(0.1, "kill")]})).counts["lost"] == 1
    # A process that is dying takes connections for a moment; nobody has waited since the kill.
    for strike in (Strike(0.9, "kill"), Strike(0.1, "kill", 0.9)):
        dying = tally(Strikes(replicas={"a": [strike]}))
        assert (dying.counts["lost"], dying.latencies_s) == (0, {})


def test_streams_without_a_proxy_meet_the_faults_of_their_engine() -> None:
    cut, whole = seen(stream(EVENTS[0]), Ending.CLOSED), seen(stream(*EVENTS, DONE))
    cut.engine = whole.engine = "a"
    killed = Strikes(replicas={"a": [Strike(2.75, "kill")]})
    assert direct_latencies([cut, whole], killed) == [0.25]
    assert direct_latencies([cut, whole], Strikes(replicas={"b": [Strike(2.75, "kill")]})) == []


def test_a_complete_stream_needs_no_explanation_and_a_second_delivery_has_none() -> None:
    told = judge([seen(stream(*EVENTS, DONE))], Strikes(), {"t1": 2, "t3": 1}, 0)
    assert (told.counts["complete"], told.twice) == (1, 1)


@pytest.mark.parametrize("word", BROKEN)
def test_a_broken_promise_fails_the_run_and_is_named(word: str) -> None:
    good = Tally(streams=2, counts={"complete": 2})
    assert complaints(Result(options=Options(), storm=good)) == []
    bad = Tally(streams=2, counts={"complete": 1, word: 1}, details=[f"{word}: t9"])
    result = Result(options=Options(), storm=bad)
    assert complaints(result) == [f"1 {word}"]
    assert f"{word}: t9" in table(result)
    assert word in OUTCOMES


def test_the_other_broken_promises() -> None:
    def broken(**fields: object) -> list[str]:
        return complaints(Result(options=Options(), **fields))  # type: ignore[arg-type]

    assert broken(storm=Tally(twice=3)) == ["3 delivered twice"]
    assert broken(storm=Tally(spoiled_bodies=1)) == ["1 bodies spoiled"]
    assert broken(unrest={"leases": 2.0}) == ["not back to zero: leases 2"]
    row = Delivery(point="head", requests=2, deliveries={2: 1, 1: 1}, outcomes={}, broken=1)
    assert broken(deliveries=[row]) == ["1 broken at 'head'"]
    stalled = Stall(seconds=2, streams=3, complete=2, outcomes={"complete": 2, "lost": 1})
    assert len(broken(stall=stalled)) == 1
    # A slow machine breaks no promise.
    assert broken(restarts=[Back(outage_s=1, first_s=9, last_failure_s=9)]) == []


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([], 0.5) == 0
    assert percentile([7.0], 0.99) == 7


# --- the weather and the scripts --------------------------------------------------------------


def test_the_same_seed_is_the_same_storm() -> None:
    assert draw_faults(50, 10_000, 4, 7) == draw_faults(50, 10_000, 4, 7)
    assert draw_faults(50, 10_000, 4, 7) != draw_faults(50, 10_000, 4, 8)
    assert draw_script(7, 3) == draw_script(7, 3)
    assert draw_script(7, 3) != draw_script(8, 3)


def test_faults_are_spread_over_the_streams_and_of_every_kind() -> None:
    faults = draw_faults(50, 10_000, 4, 1)
    assert [fault.at // 200 for fault in faults] == list(range(50))
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.engine for fault in faults} == set(range(4))


def test_scripts_are_of_every_framing_and_no_json_is_ended_by_a_close() -> None:
    scripts = [draw_script(1, number)[0] for number in range(300)]
    assert {(s.stream, s.framing) for s in scripts} == {
        (True, "chunked"),
        (True, "length"),
        (True, "close"),
        (False, "chunked"),
        (False, "length"),
    }
    assert len({s.token for s in scripts}) == 300


def test_every_point_has_an_end_that_it_must_have() -> None:
    assert {point: expected(point) for point in POINTS} == {
        "connect": ("complete", "failed"),
        "head": ("failed",),
        "half_body": ("failed",),
        "body": ("failed",),
        "response_head": ("cut: event", "cut: close"),
        "mid_body": ("cut: event", "cut: close"),
    }


# --- what stands on the wire ------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 1, 7, 1000])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_an_engine_says_is_what_its_script_asks(chunk: int, framing: str, whole: bool) -> None:
    script = Script(token="t1", chunk=chunk, framing=framing, stream=not whole, pad=9)  # type: ignore[arg-type]
    reader = TokenReader(script)
    body = b"".join(pieces(script))
    reader.feed(answer_head(script, len(body)) + body, 1.0)
    assert reader.complete or reader.feed_end()
    got = Seen(script=script, reader=reader, begun_s=0.0, ending=Ending.WHOLE)
    assert outcome(got) == ("complete", "")
    assert reader.usage is not None or whole


class Served:
    """A scripted engine in this process."""

    def __init__(self, engine: Engine, port: int) -> None:
        self.engine = engine
        self.port = port

    async def ask(self, script: Script, body: bytes = b"{}") -> tuple[Ending, TokenReader, Caller]:
        caller = await call(self.port)
        reader = TokenReader(script)
        ending = await caller.ask(render(self.port, script_text(script), body), reader, 10.0)
        return ending, reader, caller


@pytest.fixture
async def served(tmp_path: Path) -> Iterator[Served]:  # type: ignore[misc]
    engine = Engine(str(tmp_path / "journal"), brief=False)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(engine), "127.0.0.1", 0
    )
    yield Served(engine, server.sockets[0].getsockname()[1])
    for connection in list(engine.connections):
        connection.transport.abort()
    server.close()
    while engine.connections:
        await asyncio.sleep(0.001)


def words(tmp_path: Path) -> list[tuple[str, str]]:
    return [(line.what, line.token) for line in Journal(tmp_path / "journal").lines()]


async def test_an_engine_writes_down_what_it_was_given(served: Served, tmp_path: Path) -> None:
    ending, reader, caller = await served.ask(SCRIPT)
    assert (ending, reader.count, reader.done_seen) == (Ending.WHOLE, 4, True)
    again = TokenReader(Script(token="t2", crc=1))  # a body of another sum
    request = render(served.port, '{"token":"t2","crc":1}', b"{}")
    assert await caller.ask(request, again, 10.0) is Ending.WHOLE
    assert words(tmp_path) == [
        ("head", "t1"),
        ("done", "t1"),
        ("head", "t2"),
        ("spoiled", "t2"),
        ("done", "t2"),
    ]


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("point", ["head", "half_body", "body", "response_head", "mid_body"])
async def test_an_engine_fails_where_it_is_told(
    served: Served, tmp_path: Path, point: str, how: str
) -> None:
    script = Script(token="t1", point=point, how=how)  # type: ignore[arg-type]
    before_s = time.monotonic()
    ending, reader, caller = await served.ask(script, b"x" * 1000)
    assert ending in ((Ending.RESET,) if how == "reset" else (Ending.CLOSED, Ending.RESET))
    assert reader.status == (200 if point in ("response_head", "mid_body") else 0)
    assert (0 < reader.count < script.events) == (point == "mid_body")
    lines = Journal(tmp_path / "journal").lines()
    assert [(line.what, line.token) for line in lines] == [("head", "t1"), ("cut", "t1")]
    assert before_s <= lines[0].at_s <= lines[1].at_s <= caller.ended_s


async def test_an_engine_obeys_orders(served: Served, tmp_path: Path) -> None:
    slow = Script(token="t1", events=50, pause_ms=1.0)
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(served.ask(slow))
        while not served.engine.answering:
            await asyncio.sleep(0.001)
        served.engine.obey(Order(do="pause", seconds=0.01))
        served.engine.obey(Order(do="break", how="reset"))
    ending, reader, _ = asked.result()
    assert ending is Ending.RESET
    assert reader.count < 50
    assert ("cut", "t1") in words(tmp_path)

    served.engine.obey(Order(do="refuse", count=1))
    assert (await served.ask(SCRIPT))[0] in (Ending.CLOSED, Ending.RESET)
    ending, _, kept = await served.ask(SCRIPT)
    assert ending is Ending.WHOLE
    served.engine.obey(Order(do="hang_up"))
    while kept.usable:
        await asyncio.sleep(0.001)
    assert await kept.ask(b"", AnswerReader(), 1.0) is Ending.CLOSED


async def test_a_caller_gives_up_in_time_and_notes_octets_that_nobody_asked_for() -> None:
    ended = asyncio.Semaphore(0)

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"unasked")
        writer.close()
        await writer.wait_closed()
        ended.release()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        caller = await call(server.sockets[0].getsockname()[1])
        while caller.usable:
            await asyncio.sleep(0.001)
        assert caller.unasked_bytes == 7
        await ended.acquire()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.release()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        caller = await call(server.sockets[0].getsockname()[1])
        assert await caller.ask(b"x", AnswerReader(), 0.01) is Ending.NEVER
        assert not caller.usable
        await ended.acquire()


# --- the stage --------------------------------------------------------------------------------


def test_metrics_are_summed_over_their_labels() -> None:
    page = 'doherty_leases 2.0\n# HELP x\ndoherty_up{a="1"} 1\ndoherty_up{a="2"} 2.5\nother 9\n'
    assert read_metrics(page) == {"leases": 2.0, "up": 3.5}


def test_descriptors_are_counted() -> None:
    assert descriptor_count(2**31 - 1) == 0
    with Path("/dev/null").open():
        assert descriptor_count(int(Path("/proc/self").resolve().name)) > 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", [RunError, ConnectionRefusedError])
async def test_a_stage_that_fails_says_why_and_keeps_its_log(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pids: list[int] = []

    async def fail() -> None:
        raise kind("no luck")

    async def on_stage() -> None:
        async with stage(1, 1, lambda _: None) as running, asyncio.TaskGroup() as group:
            pids.extend(running.worker_pids)
            group.create_task(fail())

    with pytest.raises(RunError, match="no luck; see ") as caught:
        await on_stage()
    (folder,) = tmp_path.iterdir()
    assert str(caught.value).endswith(str(folder))
    assert {path.name for path in folder.iterdir()} == {"proxy.log", "engine-0"}
    assert len(pids) == 1
    assert descriptor_count(pids[0]) == 0  # it has been stopped


def test_ports_differ_and_lie_where_they_should() -> None:
    ports = free_ports(5, range(20_000, 32_768), random.Random(1))
    assert len(set(ports)) == 5
    assert all(20_000 <= port < 32_768 for port in ports)


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--scenario", "rain"], ["--streams", "0"], ["--faults", "-1"], ["--outages", "x"]],
)
def test_a_wrong_argument_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storm", *arguments]) == 2
    assert capsys.readouterr().err.startswith("loadtest: ")


@pytest.mark.faults
def test_a_small_storm_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "storm.json"
    assert main(["storm", "--quick", "--quiet", "--json", str(out)]) == 0, capsys.readouterr()
    result = json.loads(out.read_text())
    tally, quick = result["storm"], storm.QUICK
    assert tally["streams"] == sum(tally["counts"].values()) == quick.streams
    # Kills and breaks have met some, and most went on.
    assert 0 < tally["counts"]["complete"] < quick.streams
    assert all(tally["counts"][word] == 0 for word in BROKEN)
    assert result["stall"]["complete"] == quick.stall_streams
    assert [row["point"] for row in result["deliveries"]] == list(POINTS)
    assert [row["broken"] for row in result["deliveries"]] == [0] * len(POINTS)
    assert len(result["restarts"]) == len(quick.outages)
    assert "afterwards: gauges, connections and descriptors back to zero" in capsys.readouterr().out


def test_a_body_is_a_prompt_that_nobody_else_has() -> None:
    bodies = {request_body("t1", 500, random.Random(seed)) for seed in range(3)}
    assert len(bodies) == 3
    for body in bodies:
        assert len(json.loads(body)["messages"][0]["content"]) == 500
