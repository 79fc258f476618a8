"""Requests wait while every replica has enough to do; they go in order, and nothing is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import ReplicaRecord, ReplicaState
from proxy.core import limits
from proxy.core.prefix import PrefixChain
from proxy.core.session import response_key
from tests.fakes.plane import (
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    Client,
    Engine,
    answer,
    chat_request,
    chunk,
    records,
    until,
)

MakeBench = Callable[..., Bench]
PER_S = int(limits.PREFILL_TOKENS_PER_S_DEFAULT)


def ask(name: str, tokens: int, *, stream: bool = True, fields: tuple[str, ...] = ()) -> bytes:
    """A request of so many tokens, like no other of another name."""
    text = f"<{name}>".ljust(tokens * limits.BYTES_PER_TOKEN, name[0])
    messages = [{"role": "user", "content": text}]
    body = json.dumps({"model": "m", "stream": stream, "messages": messages}).encode()
    return chat_request(body, fields)


class Stage:
    """Requests by name, as far as they came."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.clients: dict[str, Client] = {}

    async def send(self, name: str, tokens: int, **how: object) -> Client:
        client = self.clients[name] = self.bench.client()
        client.send(ask(name, tokens, **how))  # type: ignore[arg-type]  # passed on as they came
        await self.bench.settle()
        return client

    @property
    def sent(self) -> list[str]:
        """Names in the order in which they were sent to replicas."""
        at = {}
        for engine in self.bench.upstreams.engines:
            for name in self.clients:
                if b'"<%b>' % name.encode() in engine.received:
                    at[name] = engine.transport.written_at
        return sorted(at, key=lambda name: at[name])

    def engine(self, name: str) -> Engine:
        (found,) = (
            engine
            for engine in self.bench.upstreams.engines
            if b'"<%b>' % name.encode() in engine.received
        )
        return found

    async def first_octets(self, name: str) -> None:
        self.engine(name).send(STREAM_HEAD + chunk(EVENTS[0]))
        await self.bench.settle()

    async def finish(self, name: str) -> None:
        self.engine(name).send(chunk(EVENTS[-1]) + LAST_CHUNK)
        await self.bench.settle()

    async def finish_whole(self, name: str) -> None:
        self.engine(name).send(answer())
        await self.bench.settle()


# --- who waits, and until when --------------------------------------------------------------------


async def test_a_request_waits_until_the_replica_has_computed_the_one_before(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("a", PER_S)
    await stage.send("b", PER_S, fields=("x-doherty-explain: 1",))
    assert stage.sent == ["a"]
    assert [s.value for s in bench.plane.gauges(2) if s.name == "queue_depth"] == [1, 0, 0]
    bench.clock.advance(0.875)
    await stage.first_octets("a")
    assert stage.sent == ["a", "b"]
    await stage.finish("a")
    await stage.first_octets("b")
    await stage.finish("b")
    fields = stage.clients["b"].answer().fields
    assert fields["x-doherty-queue-ms"] == "875"
    assert fields["x-doherty-overhead-us"] == "0"
    waits = [s for s in bench.plane.counters() if s.name == "queue_wait_seconds"]
    (waited,) = (s for s in waits if s.labels == (("class", "online"),))
    assert (sum(waited.buckets), waited.value) == (1, pytest.approx(0.875))


async def test_a_small_one_goes_at_once_where_there_is_little_to_do(bench: Bench) -> None:
    stage = Stage(bench)
    tokens = int(PER_S * limits.RUNWAY_S / 4)
    for name in "abc":
        await stage.send(name, tokens)
    assert stage.sent == ["a", "b", "c"]


async def test_the_shortest_goes_first_but_not_before_one_that_has_waited_long(
    bench: Bench,
) -> None:
    stage = Stage(bench)
    await stage.send("run", PER_S)
    await stage.send("long", 3 * PER_S)
    await stage.send("short", PER_S // 2)
    bench.clock.advance(4.0)
    await stage.send("late", PER_S // 2)
    for before, due in (("run", "short"), ("short", "long"), ("long", "late")):
        await stage.first_octets(before)
        assert stage.sent[-1] == due


async def test_a_long_one_is_not_starved_by_short_ones(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("s0", PER_S // 2)
    await stage.send("long", 4 * PER_S)
    for turn in range(1, 40):  # twice as many come as can be served, for ever
        await stage.send(f"s{turn}", PER_S // 2)
        await stage.send(f"t{turn}", PER_S // 2)
        bench.clock.advance(0.5)
        await stage.first_octets(stage.sent[-1])
        if "long" in stage.sent:
            break
    # It yields to those that came while it had not yet waited for what it is longer: 3.5 s.
    yielded = 2 * 3.5 / limits.AGEING_WEIGHT / 0.5
    assert yielded <= turn <= yielded + 2


async def test_an_unstreamed_answer_lets_the_next_go_when_its_prefill_should_be_over(
    bench: Bench,
) -> None:
    """No octet tells of it: the timer has to."""
    stage = Stage(bench)
    await stage.send("a", int(PER_S * limits.RUNWAY_S) + 60, stream=False)
    await stage.send("b", PER_S)
    assert stage.sent == ["a"]
    bench.clock.advance(0.01)  # what the timer was set for is over when it fires
    await until(lambda: stage.sent == ["a", "b"])


async def test_the_sweep_looks_should_nothing_else_have_told(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("a", PER_S, stream=False)
    await stage.send("b", PER_S)
    bench.sweep(2.0)
    await bench.settle()
    assert stage.sent == ["a", "b"]


@pytest.mark.parametrize("policy", ["round_robin", "random", "session"])
async def test_rules_that_do_not_ask_for_load_hold_nobody(
    make_bench: MakeBench, policy: str
) -> None:
    stage = Stage(make_bench(policy=policy))
    await stage.send("a", PER_S)
    await stage.send("b", PER_S)
    assert stage.sent == ["a", "b"]


@pytest.mark.parametrize("config", [{"queue_size": 0}, {"session_affinity": "strict"}])
async def test_who_gains_nothing_from_waiting_goes_at_once(
    make_bench: MakeBench, config: dict[str, object]
) -> None:
    stage = Stage(make_bench(**config))
    for name in "ab":
        await stage.send(name, PER_S, fields=("x-session-id: s",))
    assert stage.sent == ["a", "b"]


async def test_look_ups_do_not_wait(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("a", PER_S)
    await stage.send("b", PER_S)
    client = bench.client()
    client.send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: p\r\n\r\n")
    (await bench.engine()).send(answer())
    assert client.answer("GET").status == 200


async def test_one_that_was_refused_by_a_replica_does_not_wait_again(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("ab"))
    stage = Stage(bench)
    await stage.send("x", 2 * PER_S)
    busy = stage.engine("x").replica_id
    (other,) = {"a", "b"} - {busy}
    bench.upstreams.refusing.add(other)
    await stage.send("y", PER_S)
    assert bench.upstreams.dialled == [busy, other, busy]
    assert bench.plane.waiting.count == 0


async def test_two_workers_do_not_look_at_the_same_moment(make_bench: MakeBench) -> None:
    moments_s = []
    for draw in (0.0, 0.999):
        bench = make_bench()
        bench.clock.draw = lambda draw=draw: draw  # type: ignore[method-assign,misc]
        stage = Stage(bench)
        await stage.send("a", PER_S, stream=False)
        await stage.send("b", PER_S)
        timer = bench.plane.waiting._timer
        assert isinstance(timer, asyncio.TimerHandle)
        moments_s.append(timer.when())
    assert moments_s[1] - moments_s[0] >= 0.9 * limits.HELD_SPREAD_S


async def test_while_somebody_waits_what_others_say_is_read_again_and_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELD_SPREAD_S", 0.0)
    plane, picture = bench.plane, bench.plane.picture
    stage = Stage(bench)
    (replica,) = plane.fleet.replicas.values()
    chain = PrefixChain(1, [], [], PER_S * limits.BYTES_PER_TOKEN)
    lease = picture.acquire(replica, chain, cached_octets=0, now_s=bench.clock.now_s())
    plane.waiting.hears = True
    await stage.send("b", PER_S)
    reads = 0

    def catch_up() -> None:
        nonlocal reads
        reads += 1
        if reads == 3:
            picture.prefill_ended(lease, bench.clock.now_s())
            plane.waiting.heard()

    plane.waiting.catch_up = catch_up
    await until(lambda: stage.sent == ["b"])
    before = reads
    await asyncio.sleep(3 * limits.HELD_READ_S)
    assert reads == before  # nobody waits any more
    picture.release(lease, bench.clock.now_s())


# --- how a wait ends otherwise --------------------------------------------------------------------


async def test_a_client_that_goes_while_it_waits_leaves_nothing(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("a", PER_S)
    await stage.send("b", PER_S)
    await stage.send("c", PER_S)
    assert bench.plane.bodies_bytes > 12 * PER_S
    stage.clients["b"].transport.hang_up()
    await bench.settle()
    assert bench.plane.telemetry.cancellations == {"queued": 1}
    assert bench.plane.waiting.count == 1
    assert bench.plane.bodies_bytes < 12 * PER_S
    await stage.first_octets("a")
    assert stage.sent == ["a", "c"]
    assert bench.outcomes() == {("499", "client_gone"): 1}


async def test_who_waits_too_long_is_told_so_by_408(make_bench: MakeBench) -> None:
    bench = make_bench(queue_timeout_secs=7)
    stage = Stage(bench)
    await stage.send("a", PER_S)
    client = await stage.send("b", PER_S)
    bench.sweep(6.9)
    assert client.received == b""
    bench.sweep(0.2)
    got = client.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (408, "queue_timeout")
    assert (got.fields["x-should-retry"], got.fields["retry-after"]) == ("true", "120")
    assert bench.plane.waiting.count == 0
    client.send(chat_request(b"{}"))  # the connection lives on
    assert client.answers("POST", "POST")[1].status == 400


async def test_more_than_may_wait_are_told_when_to_come_again(make_bench: MakeBench) -> None:
    bench = make_bench(queue_size=4)
    stage = Stage(bench)
    await stage.send("r0", PER_S)
    for number in range(1, 5):
        await stage.send(f"r{number}", PER_S)
    client = await stage.send("x0", PER_S)
    got = client.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (429, "queue_full")
    assert got.fields["retry-after"] == "120"  # nobody has left yet
    for number in range(4):
        bench.clock.advance(2.0)
        await stage.first_octets(f"r{number}")
        await stage.send(f"s{number}", PER_S)
    client = await stage.send("x1", PER_S)
    got = client.answer()
    assert got.status == 429
    assert got.fields["retry-after"] == "8"  # four wait, and one leaves every two seconds


async def test_who_waits_is_served_within_the_grace_of_a_drain(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("a", PER_S)
    await stage.send("b", PER_S)
    bench.plane.draining = True
    for connection in list(bench.connections):
        connection.drain()
    await stage.first_octets("a")
    await stage.first_octets("b")
    await stage.finish("b")
    got = stage.clients["b"].answer()
    assert (got.status, got.fields["connection"]) == (200, "close")


# --- the fleet changes ----------------------------------------------------------------------------


async def test_who_waits_goes_to_a_replica_that_comes_up(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("a", 10 * PER_S)
    await stage.send("b", PER_S)
    await stage.send("c", PER_S)
    assert stage.sent == ["a"]
    bench.publish(*records("az"))
    await bench.settle()
    assert stage.sent == ["a", "b"]
    assert stage.engine("b").replica_id == "z"
    assert bench.plane.waiting.count == 1


async def test_who_waits_survives_the_death_of_the_only_replica(bench: Bench) -> None:
    """While one is coming up the request is held; when none is, it is told so."""
    (record,) = records("a")
    stage = Stage(bench)
    await stage.send("a", PER_S)
    await stage.send("b", PER_S)
    await stage.send("c", PER_S)
    bench.plane.suspect("a", "for a test")
    bench.publish(msgspec.structs.replace(record, state=ReplicaState.STARTING, restarts=1))
    bench.sweep(1.0)
    await bench.settle()
    assert bench.plane.waiting.count == 2
    bench.publish(msgspec.structs.replace(record, restarts=1))
    await bench.settle()
    assert stage.sent == ["a", "b"]
    bench.publish(*records("b", ["n"]))
    bench.sweep()
    got = stage.clients["c"].answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (503, "no_replica")


async def test_who_waited_and_is_refused_tries_the_replicas_of_today(bench: Bench) -> None:
    stage = Stage(bench)
    await stage.send("x", PER_S)
    await stage.send("y", PER_S)
    bench.upstreams.refusing = {"b"}
    bench.publish(*records("bc"))
    await bench.settle()
    assert bench.upstreams.dialled[0] == "a"
    assert bench.upstreams.dialled[-1] == "c"
    assert stage.engine("y").replica_id == "c"


async def test_where_every_replica_is_full_a_request_waits_for_room(
    make_bench: MakeBench,
) -> None:
    full = ReplicaRecord(replica_id="a", url="http://127.0.0.1:1", models=("m",), max_inputs=1)
    bench = make_bench((full,))
    stage = Stage(bench)
    await stage.send("a", 1)
    await stage.send("b", 1)
    await stage.first_octets("a")
    assert stage.sent == ["a"]
    await stage.finish("a")
    assert stage.sent == ["a", "b"]
    await stage.first_octets("b")
    await stage.finish("b")
    assert stage.clients["b"].answer().status == 200


def _limited(ids: str, max_inputs: int, *models: str) -> tuple[ReplicaRecord, ...]:
    return tuple(
        msgspec.structs.replace(record, max_inputs=max_inputs)
        for record in records(ids, models or ("m",))
    )


def _turn(name: str, previous: str) -> bytes:
    body = f'{{"model":"m","stream":true,"previous_response_id":"{previous}","input":"<{name}>"}}'
    head = f"POST /v1/responses HTTP/1.1\r\nhost: p\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def test_who_goes_on_from_an_answer_waits_for_its_keeper_and_in_nobodys_way(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(_limited("ab", 1), queue_timeout_secs=7)
    bench.plane.remember_response(response_key(b"resp_1"), "a")
    stage = Stage(bench)
    names = [f"t{number:02}" for number in range(limits.HELD_TRIED_MAX + 2)]
    for name in names:
        stage.clients[name] = bench.client()
        stage.clients[name].send(_turn(name, "resp_1"))
        await bench.settle()
    assert stage.sent == ["t00"]
    for number in range(3):
        await stage.send(f"x{number}", PER_S)
        assert stage.engine(f"x{number}").replica_id == "b"
        await stage.first_octets(f"x{number}")
        await stage.finish(f"x{number}")
        stage.engine(f"x{number}").transport.written.clear()
    bench.clock.advance(6.5)
    await stage.finish_whole("t00")
    assert b'"<t01>' in stage.engine("t01").received
    assert stage.engine("t01").replica_id == "a"
    bench.sweep(1.0)
    assert stage.clients["t02"].answer().status == 408


async def test_a_pinned_session_waits_for_its_home_when_that_is_full(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(_limited("abc", 1), session_affinity="strict")
    stage = Stage(bench)
    await stage.send("one", 1, fields=("x-session-id: s",))
    home = stage.engine("one").replica_id
    await stage.send("two", 1, fields=("x-session-id: s",))
    assert stage.sent == ["one"]
    await stage.first_octets("one")
    await stage.finish("one")
    assert stage.sent == ["one", "two"]
    assert stage.engine("two").replica_id == home


async def test_a_pinned_session_that_may_not_wait_is_refused_where_its_home_is_full(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(_limited("abc", 1), session_affinity="strict", queue_size=0)
    stage = Stage(bench)
    await stage.send("one", 1, fields=("x-session-id: s",))
    client = await stage.send("two", 1, fields=("x-session-id: s",))
    assert (client.answer().status, stage.sent) == (429, ["one"])


async def test_models_of_the_same_replicas_wait_in_one_order(make_bench: MakeBench) -> None:
    bench = make_bench(records("a", ("b", "m")))
    stage = Stage(bench)
    await stage.send("run", PER_S)
    await stage.send("long", 3 * PER_S)
    client = stage.clients["short"] = bench.client()
    client.send(ask("short", PER_S // 2).replace(b'"model": "m"', b'"model": "b"'))
    await stage.send("last", 6 * PER_S)
    for before, due in (("run", "short"), ("short", "long"), ("long", "last")):
        await stage.first_octets(before)
        assert stage.sent[-1] == due


@pytest.mark.parametrize("change", [{"queue_size": 0}, {"policy": "round_robin"}])
async def test_who_waits_goes_at_once_when_nobody_is_to_wait_any_more(
    bench: Bench, change: dict[str, object]
) -> None:
    stage = Stage(bench)
    names = ["a", *[f"b{number:02}" for number in range(limits.HELD_TAKEN_MAX + 3)]]
    for name in names:
        await stage.send(name, PER_S)
    assert stage.sent == ["a"]
    bench.plane.follow(msgspec.structs.replace(bench.plane.config, **change))
    await bench.settle()
    assert sorted(stage.sent) == names


async def test_models_that_clients_invent_make_no_queues(make_bench: MakeBench) -> None:
    bench = make_bench(records("a", ()))  # it serves anything
    stage = Stage(bench)
    await stage.send("a", PER_S)
    for number in range(5):
        request = ask(f"b{number}", PER_S).replace(b'"model": "m"', b'"model": "%d"' % number)
        bench.client().send(request)
    await bench.settle()
    assert bench.plane.waiting.count == 5
    assert len(bench.plane.waiting.queues) == 1


async def test_a_flood_that_may_go_does_not_take_a_whole_turn_of_the_loop(
    make_bench: MakeBench,
) -> None:
    full = ReplicaRecord(replica_id="a", url="http://127.0.0.1:1", models=("m",), max_inputs=1)
    bench = make_bench((full,))
    stage = Stage(bench)
    await stage.send("a", 1)
    for number in range(3 * limits.HELD_TAKEN_MAX):
        await stage.send(f"b{number}", 1)
    looks: list[int] = []
    look = bench.plane.waiting._look

    def counted() -> None:
        before = bench.plane.waiting.count
        look()
        looks.append(before - bench.plane.waiting.count)

    bench.plane.waiting._look = counted  # type: ignore[method-assign]
    bench.publish(msgspec.structs.replace(full, max_inputs=0))
    await bench.settle()
    assert bench.plane.waiting.count == 0
    assert max(looks) == limits.HELD_TAKEN_MAX


# --- whatever happens -----------------------------------------------------------------------------

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 2 * PER_S)),
        st.tuples(st.just("unstreamed"), st.integers(1, 2 * PER_S)),
        st.tuples(st.just("first octets"), st.integers(0, 7)),
        st.tuples(st.just("whole answer"), st.integers(0, 7)),
        st.tuples(st.just("client goes"), st.integers(0, 7)),
        st.tuples(st.just("engine dies"), st.integers(0, 7)),
        st.tuples(st.just("fleet"), st.integers(0, 3)),
        st.tuples(st.just("refusing"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.integers(1, 40)),
    ),
    max_size=40,
)
_FLEETS = (records("ab"), records("abc"), records("c"), ())


class _Chaos:
    """Takes steps in any order; a step that does not apply is none."""

    def __init__(self) -> None:
        self.bench = Bench(records("ab"), queue_size=5, queue_timeout_secs=6)
        self.clients: list[Client] = []
        self.streamed: set[int] = set()

    async def step(self, kind: str, value: int) -> None:
        bench = self.bench
        if kind in ("ask", "unstreamed"):
            client = bench.client()
            self.clients.append(client)
            client.send(ask(f"q{len(self.clients)}", value, stream=kind == "ask"))
        elif kind == "client goes":
            open_ones = [client for client in self.clients if not client.transport.closed]
            for client in open_ones[value : value + 1]:
                client.transport.hang_up()
        elif kind == "fleet":
            bench.publish(*_FLEETS[value])
        elif kind == "refusing":
            bench.upstreams.refusing = set("abc"[:value])
        elif kind == "time":
            bench.sweep(value / 10)
        else:
            self._engine(kind, value)
        await bench.settle()

    def _engine(self, kind: str, value: int) -> None:
        busy = [
            engine
            for engine in self.bench.upstreams.engines
            if engine.received and not engine.transport.closed
        ]
        for engine in busy[value : value + 1]:
            begun = id(engine) in self.streamed
            if kind == "engine dies":
                engine.transport.hang_up()
            elif kind == "first octets" and not begun:
                self.streamed.add(id(engine))
                engine.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
                engine.send(chunk(EVENTS[0]))
            elif kind == "whole answer":
                engine.send(
                    chunk(EVENTS[-1]) + LAST_CHUNK
                    if begun
                    else answer(fields=("connection: close",))
                )

    async def end(self) -> None:
        """Clients that are still there hear something in the end, whatever it is."""
        self.bench.publish(*records("abc"))
        self.bench.upstreams.refusing = set()
        for _ in range(200):
            if not self.bench.plane.waiting.count:
                break
            await self.step("time", 5)
            await self.step("whole answer", 0)
        assert self.bench.plane.waiting.count == 0
        self.bench.sweep(601.0)  # engines that have said nothing till now have lost their requests
        await self.bench.settle()
        for client in self.clients:
            assert client.transport.closed or client.answers()
        await self.bench.close()


@given(_STEPS)
def test_whatever_happens_nobody_is_forgotten_and_nothing_is_held(
    steps: list[tuple[str, int]],
) -> None:
    async def run() -> None:
        chaos = _Chaos()
        for kind, value in steps:
            await chaos.step(kind, value)
        await chaos.end()

    asyncio.run(run())
