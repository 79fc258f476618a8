"""A dry run says what really happens, term by term, and changes nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.contract import ReplicaRecord, ReplicaState
from proxy.core import limits
from proxy.core.policy import Prices
from proxy.core.preamble import read_preamble
from proxy.core.routes import find_route
from proxy.core.session import response_key
from proxy.io.access_log import AccessLog
from proxy.io.explain import explain
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import CHAT_BODY, Bench, answer, chat_request, records
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask

MakeBench = Callable[..., Bench]
CHAT = b"/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: p"


def explained(
    bench: Bench, body: bytes = CHAT_BODY, fields: tuple[tuple[bytes, bytes], ...] = (),
    path: bytes = CHAT,
) -> dict[str, Any]:  # fmt: skip
    status, shown = explain(bench.plane, path, fields, body)
    assert status == 200, shown
    got: dict[str, Any] = orjson.loads(shown)
    return got


def a_body(draw: random.Random) -> bytes:
    """A conversation out of a few, some turns long, now and then with a session's key."""
    name, turns = draw.randrange(6), draw.randrange(1, 8)
    said = [f"{name} {turn} " + "word " * 1000 for turn in range(turns)]
    messages = [{"role": "user", "content": text} for text in ["be brief " * 100, *said]]
    body: dict[str, object] = {"model": "m", "stream": draw.random() < 0.8, "messages": messages}
    if draw.random() < 0.3:
        body["prompt_cache_key"] = f"session-{draw.randrange(4)}"
    return json.dumps(body).encode()


def really(bench: Bench, body: bytes) -> tuple[object, ...]:
    """Send it, and say what became of it in the words of the dry run."""
    client = bench.client()
    client.send(chat_request(body))
    exchange = client.protocol._exchange
    if exchange is None:
        return (json.loads(client.received.partition(b"\r\n\r\n")[2])["error"]["code"],)
    if exchange._waiter is not None:
        return ("held",)
    decision, terms = exchange._decision, exchange._terms
    assert decision is not None
    assert terms is not None
    return (decision.reason, decision.replica.name, terms.as_dict())


def foretold(shown: dict[str, Any]) -> tuple[object, ...]:
    if shown["held"]:
        return ("held",)
    if shown["decision"] is None:
        return (shown["error"]["error"]["code"],)
    decision = dict(shown["decision"])
    replica, reason = decision.pop("replica"), decision.pop("reason")
    del decision["prompt_tokens"], decision["cached_octets"], decision["hot_octets"]
    return (reason, replica, decision)


@pytest.mark.parametrize(
    ("config", "due_kinds"),
    [
        ({"policy": "prefix"}, {"prefix", "spill", "session", "held"}),
        (
            {"policy": "prefix", "session_affinity": "strict", "queue_size": 0},
            {"prefix", "spill", "session", "too_many_requests"},
        ),
        ({"policy": "least_load"}, {"least_load", "held"}),
        ({"policy": "round_robin"}, {"round_robin", "too_many_requests"}),
        ({"policy": "session"}, {"session", "spill", "too_many_requests"}),
    ],
    ids=lambda given: "-".join(map(str, given.values())) if isinstance(given, dict) else "",
)
async def test_a_dry_run_is_what_really_happens(
    make_bench: MakeBench, config: dict[str, object], due_kinds: set[str]
) -> None:
    fleet = [
        ReplicaRecord(replica_id=name, url=f"http://127.0.0.1:{port}", models=("m",), max_inputs=3)
        for port, name in enumerate("abcd", 30000)
    ]
    bench = make_bench(fleet, **config, expose_routing=True)
    draw = random.Random(7)
    kinds = set()
    for _ in range(150):
        body = a_body(draw)
        shown = explained(bench, body)
        assert explained(bench, body) == shown
        due = foretold(shown)
        assert really(bench, body) == due
        kinds.add(due[0])
        await bench.settle()
        bench.clock.advance(draw.random() * 0.2)
        busy = [
            engine
            for engine in bench.upstreams.engines
            if engine.received and not engine.transport.closed
        ]
        for engine in draw.sample(busy, min(len(busy), draw.choice((0, 0, 0, 1, 2)))):
            engine.send(answer(fields=("connection: close",)))
        await bench.settle()
    assert kinds == due_kinds  # all that can happen did


async def test_every_candidate_is_shown_with_its_price_and_its_state(
    make_bench: MakeBench,
) -> None:
    fleet = [
        ReplicaRecord(replica_id="a", url="http://127.0.0.1:1", models=("m",)),
        ReplicaRecord(replica_id="b", url="http://127.0.0.1:2", models=("m",), max_inputs=1),
        ReplicaRecord(
            replica_id="c", url="http://127.0.0.1:3", models=("m",), state=ReplicaState.STARTING
        ),
        ReplicaRecord(replica_id="d", url="http://127.0.0.1:4", models=("m",)),
        ReplicaRecord(replica_id="e", url="http://127.0.0.1:5", models=("m",), asleep=True),
    ]
    bench = make_bench(fleet)
    bench.plane.accuse("d")
    for text in (b"one", b"two"):
        await bench.begun(chat_request(CHAT_BODY.replace(b"hello", text)))
    body = CHAT_BODY.replace(b"hello", b"x" * 40_000)
    shown = explained(bench, body, ((b"x-session-id", b"s3cret"),))
    assert (shown["route"], shown["model"], shown["policy"]) == ("chat", "m", "prefix")
    assert shown["session"] == {"given_by": "header", "pinned": False}
    assert "s3cret" not in json.dumps(shown)
    chain = shown["chain"]
    assert chain["prompt_octets"] > 40_000
    assert [point["octets"] for point in chain["points"]] == sorted(
        point["octets"] for point in chain["points"]
    )
    able, *others = shown["candidates"]
    assert (able["replica"], able["may_take"]) == ("a", True)
    assert able["uncached_tokens"] == chain["prompt_octets"] // limits.BYTES_PER_TOKEN
    parts = ("wait_s", "prefill_s", "recompute_s", "stall_s", "extra_s", "adapter_s")
    assert able["price_s"] == pytest.approx(sum(able[part] for part in parts), abs=1e-5)
    assert (able["inflight"], able["prefill_tokens_per_s"]) == (1, 30_000)
    assert able["cache_tokens"] == limits.KV_CAPACITY_TOKENS_DEFAULT
    assert {entry["replica"]: entry["reason"] for entry in others} == {
        "b": "it has as many requests as it may hold (1)",
        "c": "it is starting",
        "d": "unreachable",
        "e": "it is asleep",
    }
    assert explained(bench, body)["session"] is None


async def test_under_a_hot_prefix_the_prices_are_those_that_the_policy_compared(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("abcd"))
    plane, picture = bench.plane, bench.plane.picture

    def body(text: str) -> bytes:
        head = {"role": "system", "content": "a head for all of them " * 2000}
        return json.dumps(
            {"model": "m", "messages": [head, {"role": "user", "content": text}]}
        ).encode()

    for turn in range(limits.HOT_COUNT_MIN + 2):
        client, engine = await bench.begun(chat_request(body(f"{turn} " + "word " * 3000)))
        engine.send(answer())
        client.answer()
        await bench.settle()
        for name in "bcd":  # it lies on one replica alone
            picture.index.clear(picture.slots[name])
        bench.clock.advance(10)
    wanted = body("another " * 3000)
    shown = explained(bench, wanted)
    decision, entries = shown["decision"], shown["candidates"]
    assert decision["reason"] == "hot"
    assert decision["hot_octets"] > 40_000
    asked = plane.read(find_route(b"POST", CHAT), read_preamble(HEAD), wanted)
    pool = plane.find_pool("m", lookup=False)
    prices = Prices(asked.request, pool, picture, plane.clock.now_s())
    due = sorted(zip(prices.prices_s, [r.name for r in prices.seats.replicas], strict=True))
    assert [(entry["price_s"], entry["replica"]) for entry in entries] == [
        (pytest.approx(price_s, abs=1e-6), name) for price_s, name in due
    ]
    (chosen,) = [entry for entry in entries if entry["replica"] == decision["replica"]]
    assert chosen["price_s"] == decision["price_s"]
    parts = [name for name in entries[0] if name.endswith("_s") and name in decision]
    for entry in entries:
        assert entry["hot_octets"] == decision["hot_octets"]
        assert entry["price_s"] == pytest.approx(
            sum(entry[part] for part in parts if part != "price_s"), abs=1e-5
        )
    assert {entry["cached_tokens"] > 0 for entry in entries} == {True, False}


async def test_a_stored_answer_is_part_of_the_choice(make_bench: MakeBench) -> None:
    bench = make_bench(records("abc"))
    bench.plane.remember_response(response_key(b"resp_1"), "b")
    body = b'{"model":"m","input":"go on","previous_response_id":"resp_1"}'
    shown = explained(bench, body, path=b"/v1/responses")
    assert shown["continues_response"]
    assert (shown["decision"]["replica"], shown["decision"]["reason"]) == ("b", "response")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, b"{", 400, "invalid_json"),
        (CHAT, b'{"model":"zz"}', 404, "model_not_found"),
        (b"/v1/nope", CHAT_BODY, 404, "unknown_path"),
        (b"/v1/models", b"", 405, "method_not_allowed"),
        (b"/v1/files", b"", 400, "invalid_request"),
        (b"/v1/chat completions", CHAT_BODY, 400, "bad_request_head"),
        (CHAT, b"x" * 2000, 413, "request_too_large"),
    ],
)
async def test_what_would_be_refused_is_refused(
    make_bench: MakeBench, path: bytes, body: bytes, status: int, code: str
) -> None:
    bench = make_bench(max_payload_size=1000)
    got, shown = explain(bench.plane, path, (), body)
    assert (got, orjson.loads(shown)["error"]["code"]) == (status, code)


# --- the same terms elsewhere ---------------------------------------------------------------------


async def test_the_price_is_told_when_asked_for_and_logged(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    path = tmp_path / "access.log"
    bench = make_bench()
    bench.plane.access_log = AccessLog(str(path))
    body = CHAT_BODY.replace(b"hello", b"x" * 40_000)
    for fields in ([], ["x-doherty-explain: 1"]):
        bench.clock.advance(10)
        price = explained(bench, body)["decision"]
        client, engine = await bench.begun(chat_request(body, fields))
        engine.send(answer())
        told = client.answer().fields
        if not fields:
            assert "x-doherty-price-s" not in told
    assert float(told["x-doherty-price-s"]) == pytest.approx(price["price_s"], abs=1e-6)
    assert float(told["x-doherty-wait-s"]) == 0.0
    terms_ms = dict(term.split("=") for term in told["x-doherty-price-terms"].split(", "))
    assert {name.removesuffix("_ms") + "_s" for name in terms_ms} == {
        name for name in price if name.endswith("_s") and name != "price_s"
    }
    for name, value in terms_ms.items():
        assert float(value) == pytest.approx(1e3 * price[name.removesuffix("ms") + "s"], abs=1e-3)
        assert len(value.partition(".")[2]) == 3, "RFC 8941 knows no more"
    assert int(told["x-doherty-cached-tokens"]) == price["cached_tokens"] > 9000
    assert int(told["x-doherty-uncached-tokens"]) == price["uncached_tokens"] < 10
    bench.plane.access_log.close()
    first, second = map(json.loads, path.read_bytes().splitlines())
    assert first["price"]["uncached_tokens"] > 9000
    terms = {name: price[name] for name in second["price"]}
    assert second["price"] == terms
    assert (second["queue_ms"], second["decision"]) == (0.0, "prefix")


async def test_the_admin_listener_explains() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url, "--admin-api-key", "s3cret") as proxy,
    ):

        async def post(path: str, body: bytes, key: str = "s3cret") -> tuple[int, Any]:
            head = (
                f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
                f"x-session-id: one\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            got = await ask(proxy.admin_port, head.encode() + body, "POST")
            return got.status, orjson.loads(got.body)

        status, shown = await post("/debug/route?path=/v1/chat/completions", CHAT_BODY)
        assert status == 200
        assert shown["decision"]["reason"] == "session"
        (candidate,) = shown["candidates"]
        assert candidate["replica"] == shown["decision"]["replica"]
        status, shown = await post("/debug/route", b'{"messages":[]}')
        assert (status, shown["error"]["code"]) == (400, "missing_model")
        too_large = b" " * (limits.EXPLAINED_BYTES_MAX + 1)
        assert (await post("/debug/route", too_large))[0] == 413
        assert (await post("/debug/route", CHAT_BODY, "wrong"))[0] == 401
        assert not [request for request in engine.requests if request.body]
        (entry,) = orjson.loads((await proxy.admin("/replicas", "s3cret")).body)["replicas"]
        assert entry["prefill_tokens_per_second"] == 30_000
        assert entry["cache_tokens"] == limits.KV_CAPACITY_TOKENS_DEFAULT
        assert (entry["decoding"], entry["wait_s"]) == (0, 0)
