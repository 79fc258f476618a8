"""Who is let in, on fakes and on real sockets; what engines then see, and what nobody is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest

from proxy.config import AccessConfig, TenantConfig
from proxy.contract.keys import KeyRecord, KeySet
from proxy.io.clock import Clock
from proxy.io.explain import explain
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import Bench, RealPlane, answer, chat_request, records
from tests.fakes.talk import Talk, ask, on_uvloop

MakeBench = Callable[..., Bench]
KEY, OTHER, OLD = "key-of-acme-0001", "key-of-beta-0002", "key-of-acme-old-3"
ACCESS = AccessConfig(tenants=(TenantConfig(name="acme", models=("m",)), TenantConfig(name="beta")))
LIST = b"GET /v1/models HTTP/1.1\r\nhost: p\r\n"


def record(key: str, tenant: str, **more: float) -> KeyRecord:
    digest = sha256(key.encode()).hexdigest()
    return KeyRecord(key_id=f"id-{tenant}", tenant=tenant, digest=digest, **more)


KEYS = KeySet(
    version=1,
    salt="salt",
    keys=(record(KEY, "acme"), record(OTHER, "beta"), record(OLD, "acme", revoked_at=1.0)),
)


def bearer(key: str) -> str:
    return f"authorization: Bearer {key}"


def keyed(make_bench: MakeBench, *, told: bool = True, **config: object) -> Bench:
    models = records("a", ("m", "secret-model"))
    bench = make_bench(models, access=ACCESS, keys_path="keys.json", **config)
    if told:
        bench.plane.know_keys(KEYS)
    return bench


def status(bench: Bench, *fields: str) -> int:
    client = bench.client()
    client.send(LIST + "".join(f"{field}\r\n" for field in fields).encode() + b"\r\n")
    return client.answer("GET").status


async def test_keys_and_nothing_else_open_the_door(make_bench: MakeBench) -> None:
    bench = keyed(make_bench)
    assert status(bench, bearer(KEY)) == 200
    assert status(bench, f"x-api-key: {OTHER}") == 200
    assert [status(bench, bearer(key)) for key in (OLD, KEY[:-1], KEY + "x", KEY.upper())] == [
        401, 401, 401, 401,
    ]  # fmt: skip
    assert status(bench) == 401


async def test_a_change_counts_for_equal_heads_and_on_kept_connections(
    make_bench: MakeBench,
) -> None:
    bench = keyed(make_bench)
    client = bench.client()
    request = LIST + bearer(KEY).encode() + b"\r\n\r\n"
    client.send(request)
    client.send(request)
    bench.plane.know_keys(KeySet(version=2, salt="salt", keys=KEYS.keys[1:]))
    client.send(request)
    bench.plane.know_keys(KEYS)
    client.send(request)
    answers = client.answers("GET", "GET", "GET", "GET")
    assert [got.status for got in answers] == [200, 200, 401, 200]


async def test_who_asked_before_on_a_connection_says_nothing_of_who_asks_now(
    make_bench: MakeBench,
) -> None:
    bench = keyed(make_bench)
    client = bench.client()
    right = LIST + bearer(KEY).encode() + b"\r\n\r\n"
    client.send(right + LIST + b"\r\n" + right + LIST + bearer(OLD).encode() + b"\r\n\r\n")
    await bench.settle()
    answers = client.answers("GET", "GET", "GET", "GET")
    assert [got.status for got in answers] == [200, 401, 200, 401]


async def test_a_change_of_policy_counts_at_once(make_bench: MakeBench) -> None:
    bench = keyed(make_bench)
    assert status(bench, bearer(KEY)) == 200
    gone = AccessConfig(tenants=ACCESS.tenants[1:])
    bench.plane.reconfigure(
        bench.plane.config.__class__(access_log="off", access=gone), bench.plane.access_log
    )
    assert status(bench, bearer(KEY)) == 401
    assert status(bench, bearer(OTHER)) == 200


async def test_nobody_is_let_in_before_keys_are_known(make_bench: MakeBench) -> None:
    bench = keyed(make_bench, told=False, api_key="master")
    client = bench.client()
    client.send(LIST + bearer(KEY).encode() + b"\r\n\r\n")
    got = client.answer("GET")
    assert (got.status, got.fields["x-should-retry"]) == (503, "true")
    assert json.loads(got.body)["error"]["code"] == "keys_not_known"
    assert status(bench, bearer("master")) == 200
    assert status(bench) == 401


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"manager_url": "http://127.0.0.1:1"}, 503), ({"worker_urls": ("http://a:1",)}, 401)],
)
async def test_tenants_demand_keys_wherever_these_come_from(
    make_bench: MakeBench, config: dict[str, Any], expected: int
) -> None:
    bench = make_bench(access=ACCESS, **config)
    assert status(bench, bearer(KEY)) == expected
    assert status(bench) == 401


async def test_keys_end_with_their_time(make_bench: MakeBench) -> None:
    bench = keyed(make_bench, told=False)
    end_s = bench.clock.unix_s() + 10.0
    bench.plane.know_keys(KeySet(keys=(record(KEY, "acme", expires_at=end_s),)))
    assert status(bench, bearer(KEY)) == 200
    bench.clock.advance(10.0)
    assert status(bench, bearer(KEY)) == 401


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
async def test_health_is_anybodys(make_bench: MakeBench, path: str) -> None:
    client = keyed(make_bench, told=False).client()
    client.send(f"GET {path} HTTP/1.1\r\nhost: p\r\n\r\n".encode())
    assert client.answer("GET").status == 200


@pytest.mark.parametrize(("own", "sent"), [(None, []), ("master", ["Bearer master"]), (KEY, [])])
async def test_engines_see_no_tenants_key(
    make_bench: MakeBench, own: str | None, sent: list[str]
) -> None:
    bench = keyed(make_bench, api_key=own)
    for fields in (
        (bearer(KEY),),
        (f"x-api-key: {KEY}",),
        (bearer(KEY), f"x-api-key: {KEY}", f"api-key: {KEY}", f"x-goog-api-key: {KEY}"),
    ):
        request = chat_request(fields=fields).replace(
            b"completions ", f"completions?api_key={KEY}&beta=true ".encode()
        )
        client, engine = await bench.begun(request)
        head = engine.received.rpartition(b"POST ")[2].decode()
        assert KEY not in head
        assert head.startswith("/v1/chat/completions?beta=true HTTP/1.1\r\n")
        lines = [line for line in head.split("\r\n") if line.startswith("authorization")]
        assert [line.partition(": ")[2] for line in lines] == sent
        engine.send(answer())
        await bench.settle()
        assert client.answer().status == 200


async def test_nobody_asks_in_anothers_name(make_bench: MakeBench) -> None:
    """What proxy and offline service tell each other is no client's to say."""
    bench = keyed(make_bench, internal_key="between-the-two")
    forged = ("x-doherty-tenant: beta", f"x-doherty-proof: {'0' * 64}")
    client, engine = await bench.begun(chat_request(fields=[bearer(KEY), *forged]))
    assert client.protocol._exchange is not None
    assert client.protocol._exchange._principal.tenant == "acme"
    assert b"x-doherty-" not in engine.received
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200
    assert status(bench, *forged) == 401


async def test_with_one_key_for_all_it_goes_on_as_it_came(make_bench: MakeBench) -> None:
    bench = make_bench(api_key="master")
    client, engine = await bench.begun(chat_request(fields=["x-api-key: master"]))
    assert b"authorization: Bearer master\r\n" in engine.received
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200


@pytest.mark.parametrize("own", [None, "master"])
async def test_engines_do_not_see_what_the_offline_service_is_known_by(
    make_bench: MakeBench, own: str | None
) -> None:
    bench = make_bench(api_key=own, internal_key="between-the-two")
    client, engine = await bench.begun(chat_request(fields=[bearer("between-the-two")]))
    assert b"between-the-two" not in engine.received
    assert (b"authorization: Bearer master\r\n" in engine.received) == (own is not None)
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200


async def test_what_a_key_may_not_ask_for_is_not_there(make_bench: MakeBench) -> None:
    bench = keyed(make_bench)

    def models(key: str, path: str = "/v1/models") -> tuple[int, bytes]:
        client = bench.client()
        client.send(f"GET {path} HTTP/1.1\r\nhost: p\r\n{bearer(key)}\r\n\r\n".encode())
        got = client.answer("GET")
        return got.status, got.body

    assert [model["id"] for model in json.loads(models(KEY)[1])["data"]] == ["m"]
    assert len(json.loads(models(OTHER)[1])["data"]) == 2
    assert models(KEY, "/v1/models/m")[0] == 200
    hidden, nowhere = (models(KEY, f"/v1/models/{name}") for name in ("secret-model", "other"))
    assert hidden[0] == nowhere[0] == 404
    assert hidden[1].replace(b"secret-model", b"other") == nowhere[1]


def proxy_before(engine: ScriptedEngine) -> RealPlane:
    proxy = RealPlane([engine.record("a")], Clock(), access=ACCESS)
    proxy.plane.know_keys(KEYS)
    return proxy


LARGE = "k" * 9000
# Requests that hold the right key in the wrong way, and what becomes of them.
ATTACKS = [
    (f"{bearer(KEY)}\r\n{bearer(KEY)}", 400),
    (f"{bearer(KEY)}\r\n{bearer('other')}", 400),
    (f"x-api-key: {KEY}\r\nx-api-key: {KEY}", 400),
    (f"x-api-key: other\r\nx-api-key: {KEY}", 400),
    (f"authorization: Bearer\r\n {KEY}", 400),
    (f"x-api-key:\r\n\t{KEY}", 400),
    (f"authorization : Bearer {KEY}", 400),
    (f"{bearer(KEY)}\x00", 400),
    (f"connection: authorization\r\n{bearer(KEY)}", 400),
    (f"connection: x-api-key\r\nx-api-key: {KEY}", 400),
    (f"{bearer(KEY)}\r\nx-api-key: other", 401),
    (f"{bearer('other')}\r\nx-api-key: {KEY}", 401),
    (f"authorization: Basic {KEY}\r\nx-api-key: {KEY}", 401),
    (f"authorization: Basic {KEY}", 401),
    (f"authorization: {KEY}", 401),
    (f"{bearer(KEY)}, Bearer {KEY}", 401),
    (f"{bearer(KEY)},{KEY}", 401),
    (f"x-api-key: {KEY}, {KEY}", 401),
    (f"{bearer(KEY)}{LARGE}", 401),
    (f"x-api-key: {LARGE}", 401),
    (f"{bearer(KEY)}\u00e9", 401),
    (f"{bearer(KEY)}\u2028", 401),
    (f"cookie: api_key={KEY}", 401),
    (f"proxy-authorization: Bearer {KEY}", 401),
    (f"api-key: {KEY}", 401),
    ("authorization:", 401),
    ("authorization: Bearer", 401),
    ("x-api-key:", 401),
]


@on_uvloop
async def test_credentials_that_could_be_read_in_two_ways_over_real_sockets() -> None:
    async with ScriptedEngine() as engine, proxy_before(engine) as proxy:
        for fields, expected in ATTACKS:
            got = await ask(proxy.port, chat_request(fields=[fields]))
            assert got.status == expected, fields
            assert json.loads(got.body)["error"]["type"] in (
                "authentication_error", "invalid_request_error",
            )  # fmt: skip
            assert KEY.encode() not in got.body
            if expected == 401:
                assert got.fields["www-authenticate"] == "Bearer"
        assert engine.requests == []
        for fields in (bearer(KEY), f"{bearer(KEY)}\r\nx-api-key: {KEY}"):
            assert (await ask(proxy.port, chat_request(fields=[fields]))).status == 200


@on_uvloop
async def test_an_address_or_a_trailer_is_no_place_for_a_key() -> None:
    async with ScriptedEngine() as engine, proxy_before(engine) as proxy:
        for name in ("api_key", "key", "access_token", "authorization", "x-api-key"):
            line = f"GET /v1/models?{name}={KEY} HTTP/1.1\r\nhost: p\r\n\r\n"
            assert (await ask(proxy.port, line.encode(), "GET")).status == 401
        body = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n"
        end = f"0\r\n{bearer(KEY)}\r\nx-api-key: {KEY}\r\n\r\n".encode()
        chunked = b"\r\n%x\r\n%b\r\n%b" % (len(body), body, end)
        named = b"trailer: authorization, x-api-key\r\n"
        for more in (b"", named):
            assert (await ask(proxy.port, head + more + chunked)).status == 401
        assert engine.requests == []
        # Behind a right head they change nothing, and the engine sees nothing of them.
        right = bearer(OTHER).encode() + b"\r\n"
        async with Talk(proxy.port) as talk:
            await talk.send(head + right + named + chunked)
            assert (await talk.answer()).status == 200
        (got,) = engine.requests
        assert KEY.encode() not in got.head + got.body
        assert OTHER.encode() not in got.head


async def test_a_dry_run_is_made_as_whoever_it_names(make_bench: MakeBench) -> None:
    bench = keyed(make_bench)
    path, body = b"/v1/chat/completions", b'{"model":"secret-model","messages":[]}'

    def explained(*fields: tuple[bytes, bytes]) -> tuple[int, dict[str, object]]:
        got, shown = explain(bench.plane, path, fields, body)
        return got, json.loads(shown)

    assert explained()[0] == 200  # an admin may ask for anything
    got, shown = explained((b"x-api-key", OTHER.encode()))
    assert (got, shown["tenant"], shown["key_id"]) == (200, "beta", "id-beta")
    assert explained((b"x-api-key", KEY.encode()))[0] == 404
    assert explained((b"x-api-key", OLD.encode()))[0] == 401


async def test_why_nobody_serves_is_said_without_names_that_may_be_of_others(
    make_bench: MakeBench,
) -> None:
    bench = keyed(make_bench)
    assert "secret-model" in make_bench(
        records("a", ("m", "secret-model"))
    ).plane.no_replica_reason(bench.plane.find_pool("m", lookup=False))
    reason = bench.plane.no_replica_reason(bench.plane.find_pool("m", lookup=False))
    assert "secret-model" not in reason
