"""What the offline service hears of tenants, and whose word the proxy takes for whom it asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256

import msgspec
import pytest

from proxy.config import AccessConfig, TenantConfig
from proxy.contract.behalf import in_field, proof_of
from proxy.contract.keys import KeyRecord, KeySet
from tests.fakes.plane import CHAT_BODY, Bench, answer, chat_request, records

MakeBench = Callable[..., Bench]
URL, INTERNAL = "http://127.0.0.1:8003", "the-secret-of-this-run"
WEB, APP, OTHER, NEW = ("key-web-00000000", "key-app-00000000", "key-of-beta-0000", "key-new-0")
ACCESS = AccessConfig(tenants=(TenantConfig(name="acme", models=("m",)), TenantConfig(name="beta")))
FORGED = ("x-doherty-tenant: beta", "x-doherty-proof: 00")


def record(key: str, tenant: str) -> KeyRecord:
    digest = sha256(key.encode()).hexdigest()
    return KeyRecord(key_id=key[:7], tenant=tenant, digest=digest)


KEYS = KeySet(
    version=1,
    salt="s" * 16,
    keys=(record(WEB, "acme"), record(APP, "acme"), record(OTHER, "beta")),
)


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    made = make_bench(records("a", ("m", "large")), access=ACCESS, offline_url=URL,
                      internal_key=INTERNAL)  # fmt: skip
    made.plane.know_keys(KEYS)
    return made


async def passed(bench: Bench, key: str, *more: str) -> dict[str, str]:
    """Ask for files with a key; return the fields that the service gets."""
    client = bench.client()
    fields = "".join(f"{field}\r\n" for field in (f"authorization: Bearer {key}", *more))
    client.send(f"GET /v1/files HTTP/1.1\r\nhost: p\r\n{fields}\r\n".encode())
    await bench.settle()
    service = bench.service.engines[-1]
    head = service.received.decode()
    service.send(answer(b"{}", fields=("connection: close",)))
    assert client.answer("GET").status == 200
    assert key not in head
    names = [line.partition(":")[0] for line in head.splitlines()[1:] if line]
    assert len(names) == len(set(names)), "no field comes twice"
    return dict(re.findall(r"^(\S+): (.*)\r$", head, re.MULTILINE))


async def test_all_keys_of_a_tenant_own_the_same_files_and_nobody_elses(bench: Bench) -> None:
    web, app, other = [await passed(bench, key) for key in (WEB, APP, OTHER)]
    assert web["authorization"] == app["authorization"] != other["authorization"]
    # After a rotation, in which only the salt stays, too.
    bench.plane.know_keys(msgspec.structs.replace(KEYS, keys=(record(NEW, "acme"),)))
    assert (await passed(bench, NEW))["authorization"] == web["authorization"]
    bench.plane.know_keys(msgspec.structs.replace(KEYS, salt="t" * 16))
    assert (await passed(bench, WEB))["authorization"] != web["authorization"]


async def test_the_service_is_told_whose_request_it_is_and_clients_cannot_say_so(
    bench: Bench,
) -> None:
    fields = await passed(bench, WEB, *FORGED)
    assert fields["x-doherty-tenant"] == "acme"
    credential = fields["authorization"].removeprefix("Bearer ")
    assert fields["x-doherty-proof"] == proof_of(INTERNAL, credential, "acme")
    assert INTERNAL not in str(fields)


async def test_a_credential_that_was_derived_opens_no_proxy(bench: Bench) -> None:
    credential = (await passed(bench, WEB))["authorization"]
    client = bench.client()
    client.send(chat_request(fields=(f"authorization: {credential}",)))
    assert client.answer().status == 401


async def test_without_a_shared_secret_nothing_is_said_that_could_not_be_shown(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("a"), access=ACCESS, offline_url=URL)
    bench.plane.know_keys(KEYS)
    fields = await passed(bench, WEB, *FORGED)
    assert not {"x-doherty-tenant", "x-doherty-proof"} & fields.keys()
    assert fields["authorization"] != f"Bearer {WEB}"


async def test_who_has_the_one_key_is_known_by_it_as_before(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"), offline_url=URL, api_key="master")
    client = bench.client()
    client.send(b"GET /v1/files HTTP/1.1\r\nhost: p\r\nauthorization: Bearer master\r\n\r\n")
    await bench.settle()
    assert b"authorization: Bearer master\r\n" in bench.service.engines[-1].received
    assert b"x-doherty-tenant" not in bench.service.engines[-1].received


async def asked(bench: Bench, key: str, *more: str, model: bytes = b"m") -> tuple[int, str]:
    """Ask for a completion; return the status, and what the engine got, if it was asked."""
    before = len(bench.upstreams.engines)
    client = bench.client()
    body = CHAT_BODY.replace(b'"m"', b'"%b"' % model)
    client.send(chat_request(body, (f"authorization: Bearer {key}", *more)))
    await bench.settle()
    heads = [engine.received.decode() for engine in bench.upstreams.engines[before:]]
    for engine in bench.upstreams.engines[before:]:
        engine.send(answer(fields=("connection: close",)))
    return client.answer().status, "".join(heads)


async def test_lines_of_jobs_may_what_their_tenant_may(bench: Bench) -> None:
    acme, beta = "x-doherty-tenant: acme", "x-doherty-tenant: beta"
    status, head = await asked(bench, INTERNAL, acme)
    assert status == 200
    assert INTERNAL not in head
    assert "x-doherty-tenant" not in head
    # No 404, at which lines wait for the model to come, and no 401, at which all lines stop.
    assert (await asked(bench, INTERNAL, acme, model=b"large"))[0] == 400
    assert (await asked(bench, INTERNAL, beta, model=b"large"))[0] == 200
    gone = in_field("däns & co")
    assert (await asked(bench, INTERNAL, f"x-doherty-tenant: {gone}"))[0] == 400
    assert (await asked(bench, INTERNAL))[0] == 200


async def test_nobody_else_asks_for_another(bench: Bench) -> None:
    beta = "x-doherty-tenant: beta"
    assert (await asked(bench, WEB, beta, model=b"large"))[0] != 200
    status, head = await asked(bench, WEB, beta)
    assert (status, "x-doherty-tenant" in head) == (200, False)
    assert (await asked(bench, INTERNAL[:-1], beta))[0] == 401


async def sent(bench: Bench, key: str, request: str) -> tuple[int, str]:
    """Ask for files or jobs; return the status, and the code of what is refused here."""
    before, client = len(bench.service.engines), bench.client()
    client.send(f"{request} HTTP/1.1\r\nhost: p\r\nauthorization: Bearer {key}\r\n\r\n".encode())
    await bench.settle()
    for service in bench.service.engines[before:]:
        service.send(answer(b"{}", fields=("connection: close",)))
    told = client.answer(request.split(maxsplit=1)[0])
    code = msgspec.json.decode(told.body).get("error", {}).get("code", "")
    assert bool(code) == (len(bench.service.engines) == before)
    return told.status, code


@pytest.mark.parametrize("rights", [{"models": ("m",)}, {"regions": ("here",)}])
async def test_a_key_that_may_less_than_its_tenant_makes_no_jobs(
    make_bench: MakeBench, rights: dict[str, tuple[str, ...]]
) -> None:
    """Their lines are asked for on behalf of the tenant, when the key may be gone."""
    bench = make_bench(records("a"), region="here", offline_url=URL, internal_key=INTERNAL,
                       access=AccessConfig(tenants=(TenantConfig(name="t", models=("m", "n")),
                                                    TenantConfig(name="u", **rights))))  # fmt: skip
    narrow = msgspec.structs.replace(record(WEB, "t"), **rights)  # type: ignore[arg-type]
    same = msgspec.structs.replace(record(OTHER, "u"), **rights)  # type: ignore[arg-type]
    keys = (narrow, record(APP, "t"), same)
    bench.plane.know_keys(msgspec.structs.replace(KEYS, keys=keys))
    assert await sent(bench, WEB, "POST /v1/batches") == (403, "key_too_narrow")
    assert await sent(bench, WEB, "GET /v1/batches") == (200, "")
    assert await sent(bench, WEB, "POST /v1/batches/batch_1/cancel") == (200, "")
    assert await sent(bench, APP, "POST /v1/batches") == (200, "")
    assert await sent(bench, OTHER, "POST /v1/batches") == (200, "")


async def test_files_and_jobs_stay_out_of_regions_that_are_not_theirs(
    make_bench: MakeBench,
) -> None:
    tenants = (TenantConfig(name="acme", regions=("there",)), TenantConfig(name="beta"))
    bench = make_bench(records("a"), region="here", offline_url=URL, internal_key=INTERNAL,
                       access=AccessConfig(tenants=tenants))  # fmt: skip
    bench.plane.know_keys(KEYS)
    for request in ("POST /v1/files", "POST /v1/batches", "GET /v1/files/file-1/content"):
        assert await sent(bench, WEB, request) == (403, "region_not_allowed")
        assert await sent(bench, OTHER, request) == (200, "")


async def test_a_tenant_that_is_configured_anew_is_another_at_once(bench: Bench) -> None:
    acme = "x-doherty-tenant: acme"
    assert (await asked(bench, INTERNAL, acme, model=b"large"))[0] != 200
    access = AccessConfig(tenants=(TenantConfig(name="acme"),))
    config = msgspec.structs.replace(bench.plane.config, access=access)
    bench.plane.reconfigure(config, bench.plane.access_log)
    assert (await asked(bench, INTERNAL, acme, model=b"large"))[0] == 200
