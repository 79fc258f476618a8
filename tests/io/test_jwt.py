"""Tokens in place of keys: on a worker in hand, and with a proxy, its provider and a rotation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from proxy.config import AccessConfig, JwtConfig, ProxyConfig, TenantConfig
from proxy.contract.keys import KeySet
from proxy.core import claim_limits
from proxy.io.authentication import ASK_INTERVAL_S, PATIENCE_S
from proxy.io.jwt_keys import JwtKeys
from proxy.io.jwt_tokens import Jwks
from proxy.io.tasks import Tasks
from tests.fakes import provider_of_tokens as provider
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import Bench, answer, chat_request
from tests.fakes.provider_of_tokens import AUDIENCE, OTHER_RSA, RSA, TokenProvider, jwk, jwks
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask, on_uvloop

MakeBench = Callable[..., Bench]
ISSUER = "https://issuer.example"
JWT = JwtConfig(issuer=ISSUER, audience=AUDIENCE, leeway_secs=0)
TENANTS = (TenantConfig(name="acme", models=("m",)), TenantConfig(name="default"))
ONE = jwks(jwk(RSA, "one"))


def bench_with(make_bench: MakeBench, document: bytes = ONE, **jwt: object) -> Bench:
    config = JwtConfig(issuer=ISSUER, audience=AUDIENCE, leeway_secs=0, **jwt)  # type: ignore[arg-type]
    bench = make_bench(access=AccessConfig(tenants=TENANTS, jwt=config))
    if document:
        bench.plane.authentication.know_jwt_keys(document)
    return bench


def token(bench: Bench, tenant: str = "acme", *, key: object = RSA, kid: str = "one") -> str:
    exp = bench.clock.unix_s() + 600
    return provider.token(provider.claims(ISSUER, sub=tenant, exp=exp), key, kid=kid)


def asked(bench: Bench, shown: str) -> tuple[int, str]:
    client = bench.client()
    line = f"GET /v1/models HTTP/1.1\r\nhost: p\r\nauthorization: Bearer {shown}\r\n\r\n"
    client.send(line.encode())
    got = client.answer("GET")
    assert shown.encode() not in got.body
    return got.status, json.loads(got.body).get("error", {}).get("message", "")


async def test_a_token_is_a_key_until_it_ends(make_bench: MakeBench) -> None:
    bench = bench_with(make_bench)
    shown = token(bench)
    assert asked(bench, shown) == (200, "")
    bench.clock.advance(599)
    assert asked(bench, shown) == (200, "")
    bench.clock.advance(1)
    assert asked(bench, shown) == (401, "the token has expired")
    assert asked(bench, shown) == (401, "the token has expired")  # not only out of what was kept


async def test_a_token_is_verified_once(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_with(make_bench)
    judged: list[bytes] = []
    judge = Jwks.judge
    monkeypatch.setattr(Jwks, "judge", lambda self, t, s: (judged.append(t), judge(self, t, s))[1])
    shown = token(bench)
    for _ in range(3):
        assert asked(bench, shown)[0] == 200
    assert len(judged) == 1
    # What it rests on changes: it is verified anew.
    bench.plane.know_keys(KeySet())
    assert asked(bench, shown)[0] == 200
    assert len(judged) == 2


async def test_what_is_remembered_has_a_bound(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_limits, "TOKENS_REMEMBERED_MAX", 3)
    bench = bench_with(make_bench)
    for number in range(8):
        content = provider.claims(ISSUER, exp=bench.clock.unix_s() + 600, jti=str(number))
        assert asked(bench, provider.token(content))[0] == 200
        assert len(bench.plane.authentication._tokens) <= 3
    for number in range(8):
        assert asked(bench, f"a.b.{number}")[0] == 401
    assert len(bench.plane.authentication._tokens) <= 3


async def test_a_key_that_the_provider_takes_back_ends_its_tokens(make_bench: MakeBench) -> None:
    bench = bench_with(make_bench)
    shown = token(bench)
    assert asked(bench, shown)[0] == 200
    bench.plane.authentication.know_jwt_keys(jwks(jwk(OTHER_RSA, "two")))
    assert asked(bench, shown)[0] == 503  # it may have been a mistake: it is asked once more
    bench.clock.advance(PATIENCE_S)
    assert asked(bench, shown)[0] == 401
    assert asked(bench, token(bench, key=OTHER_RSA, kid="two"))[0] == 200
    with pytest.raises(ValueError, match="no key"):
        bench.plane.authentication.know_jwt_keys(jwks())  # the last good ones stay
    assert asked(bench, token(bench, key=OTHER_RSA, kid="two"))[0] == 200


async def test_unknown_keys_are_asked_for_now_and_then(make_bench: MakeBench) -> None:
    bench = bench_with(make_bench)
    wanted: list[float] = []
    bench.plane.authentication.on_unknown_key = lambda: wanted.append(bench.clock.now_s())
    for _ in range(3 * int(ASK_INTERVAL_S)):
        asked(bench, token(bench, key=OTHER_RSA, kid="two"))
        bench.clock.advance(1.0)
    assert len(wanted) == 3


async def test_before_the_providers_keys_are_known(make_bench: MakeBench) -> None:
    bench = bench_with(make_bench, b"")
    assert not bench.plane.authentication.complete
    assert asked(bench, token(bench))[0] == 503
    assert asked(bench, "no-token")[0] == 401
    bench.plane.authentication.know_jwt_keys(ONE)
    assert bench.plane.authentication.complete
    assert asked(bench, token(bench))[0] == 200
    bench.plane.authentication.know_jwt_keys(b"")
    assert asked(bench, token(bench))[0] == 503


async def test_another_provider_is_not_believed_on_the_word_of_the_first(
    make_bench: MakeBench,
) -> None:
    bench = bench_with(make_bench)
    assert asked(bench, token(bench))[0] == 200
    other = JwtConfig(issuer=ISSUER, audience="others")
    config = ProxyConfig(access_log="off", access=AccessConfig(tenants=TENANTS, jwt=other))
    bench.plane.reconfigure(config, bench.plane.access_log)
    assert asked(bench, token(bench))[0] == 503
    config = ProxyConfig(access_log="off", access=AccessConfig(tenants=TENANTS), api_key="k")
    bench.plane.reconfigure(config, bench.plane.access_log)
    bench.plane.authentication.know_jwt_keys(ONE)  # on its way when the configuration changed
    assert asked(bench, token(bench))[0] in (401, 503)


async def test_tenants_that_nobody_configured(make_bench: MakeBench) -> None:
    refusing = bench_with(make_bench)
    status, message = asked(refusing, token(refusing, "stranger"))
    assert (status, "not configured" in message, "stranger" in message) == (401, True, False)
    taking = bench_with(make_bench, unknown_tenants="default")
    assert asked(taking, token(taking, "stranger"))[0] == 200


async def test_engines_see_no_token(make_bench: MakeBench) -> None:
    bench = bench_with(make_bench)
    client, engine = await bench.begun(
        chat_request(fields=[f"authorization: Bearer {token(bench)}"])
    )
    assert b"authorization" not in engine.received
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200


# --- the keeper of keys, and a proxy ---------------------------------------------------------


@contextlib.asynccontextmanager
async def keeper(config: JwtConfig) -> AsyncIterator[tuple[JwtKeys, asyncio.Queue[bytes]]]:
    tasks, told = Tasks(), asyncio.Queue[bytes]()
    keys = JwtKeys(tasks, told.put_nowait)
    keys.look(config)
    try:
        yield keys, told
    finally:
        await tasks.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.002)


async def test_keys_are_found_by_discovery_and_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proxy.io.jwt_keys.ASK_AGAIN_S", 0.02)
    async with TokenProvider() as idp:
        config = JwtConfig(issuer=idp.issuer, audience=AUDIENCE)
        async with keeper(config) as (keys, told):
            assert await told.get() == idp.document
            keys.look(config)  # the same changes nothing
            before = idp.asked
            keys.want()
            await until(lambda: idp.asked > before)
            assert told.empty()  # it is as it was
            idp.status = 500
            before = idp.asked
            keys.want()
            await until(lambda: keys.samples()[0][0].value > 0)
            assert told.empty()  # the last good ones stay
            idp.status, idp.document = 200, jwks(jwk(OTHER_RSA, "two"))
            keys.want()
            assert await told.get() == idp.document
            assert keys.samples()[1][0].value < 30
            keys.look(None)
            assert await told.get() == b""
            assert keys.samples() == ([], [])


@pytest.mark.parametrize("kind", ["issuer", "redirect", "size", "uri", "none"])
async def test_a_provider_that_is_not_what_it_should_be(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = {
        "issuer": "another issuer",
        "redirect": "answers 302",
        "size": "over",
        "none": "no key",
        "uri": "https",
    }
    async with TokenProvider() as idp:
        if kind == "issuer":
            idp.says_issuer = "https://evil.example"
        elif kind == "redirect":
            idp.status = 302
        elif kind == "size":
            idp.document = b" " * (claim_limits.JWKS_BYTES_MAX + 1)
        elif kind == "uri":
            idp.uri = "http://evil.example/keys"
        else:
            idp.document = jwks({"kty": "oct", "k": "AAAA"})
        async with keeper(JwtConfig(issuer=idp.issuer, audience=AUDIENCE)) as (keys, told):
            await until(lambda: keys.samples()[0][0].value > 0)
            assert told.empty()
            assert words[kind] in caplog.text


async def test_keys_in_a_file_are_read_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.io.jwt_keys.LOOK_INTERVAL_S", 0.005)
    path = tmp_path / "jwks.json"
    config = JwtConfig(issuer=ISSUER, audience=AUDIENCE, jwks_path=str(path))
    async with keeper(config) as (keys, told):
        await until(lambda: keys.samples()[0][0].value > 0)  # there is none yet
        for document in (ONE, b"garbage", jwks(jwk(OTHER_RSA, "two"))):
            new = tmp_path / "new"
            new.write_bytes(document)
            os.replace(new, path)
            if document == b"garbage":
                failures = keys.samples()[0][0].value
                await until(lambda f=failures: keys.samples()[0][0].value > f)  # type: ignore[misc]
            else:
                assert await told.get() == document
        assert told.empty()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"jwks_url": "https://a/keys", "jwks_path": "f"}, "exclude each other"),
        ({"jwks_url": "http://a.example/keys"}, "must be an https URL"),
        ({"issuer": "http://a.example"}, "the issuer must be"),
        ({"issuer": "accounts.example"}, "the issuer must be"),
    ],
)
def test_what_cannot_be_trusted_is_refused_in_the_configuration(
    more: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        JwtConfig(**{"issuer": ISSUER, "audience": AUDIENCE, **more})


@on_uvloop
async def test_a_proxy_and_its_provider(tmp_path: Path) -> None:
    async with TokenProvider() as idp, ScriptedEngine() as engine:
        config = tmp_path / "doherty.yaml"
        config.write_text(
            "tenants: [{name: acme}]\n"
            f"jwt: {{issuer: '{idp.issuer}', audience: {AUDIENCE}}}\n"
            f"proxy: {{workers: 2, worker_urls: ['{engine.url}']}}\n"
        )

        def request(shown: str) -> bytes:
            return chat_request(fields=[f"authorization: Bearer {shown}"])

        async with ProxyProcess("--config", str(config)) as proxy:
            for _ in range(4):  # some of them come to each worker
                assert (await ask(proxy.port, request(idp.token()))).status == 200
            assert (await ask(proxy.port, request(idp.token(key=OTHER_RSA)))).status == 401
            assert (await ask(proxy.port, chat_request())).status == 401
            # A new key signs before anybody has heard of it.
            idp.document = jwks(jwk(RSA, "one"), jwk(OTHER_RSA, "two"))
            new = request(idp.token(key=OTHER_RSA, kid="two"))
            got = await ask(proxy.port, new)
            assert (got.status, got.fields["x-should-retry"]) == (503, "true")
            while (await ask(proxy.port, new)).status != 200:
                await asyncio.sleep(0.01)
            page = (await proxy.admin("/metrics")).body
            assert b"doherty_jwt_keys_age_seconds" in page
            assert all(b"authorization" not in got.head.lower() for got in engine.requests)
