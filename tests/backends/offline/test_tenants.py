"""Whose files and jobs are whose, and that a tenant's name reaches the lines of its jobs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from backends.offline.api_errors import ApiError
from backends.offline.schema import STEPS
from backends.offline.store import Store
from backends.offline.tenants import Asker, Door
from proxy.contract.behalf import in_field, proof_of
from tests.fakes.stored_jobs import ask, begun_job

SECRET = "of-this-run"


def fields(tenant: str, credential: str = "c", secret: str = SECRET) -> dict[str, str]:
    return {
        "Authorization": f"Bearer {credential}",
        "x-doherty-tenant": in_field(tenant),
        "x-doherty-proof": proof_of(secret, credential, tenant),
    }


def test_the_proxys_word_is_taken_with_its_proof_alone() -> None:
    door = Door(internal_key=SECRET)
    asker = door.asker(fields("acme & söhne"))
    assert asker.tenant == "acme & söhne"
    assert asker.owner == door.asker(fields("acme & söhne")).owner
    assert asker.owner != door.asker(fields("acme", "d")).owner
    moved = fields("acme") | {"x-doherty-tenant": "beta"}
    others = fields("acme") | {"Authorization": "Bearer other"}
    for wrong in (moved, others, fields("acme", secret="x"), {"x-doherty-tenant": "acme"}, {}):
        with pytest.raises(ApiError) as refused:
            door.asker(wrong)
        assert refused.value.status == 401


def test_where_there_is_one_key_it_opens_and_owns_as_before() -> None:
    key = {"Authorization": "Bearer k"}
    plain, both = Door(api_key="k"), Door(api_key="k", internal_key=SECRET)
    assert plain.asker(key) == both.asker(key) == Door().asker(key)
    assert both.asker(fields("acme")).tenant == "acme"
    for door in (plain, both):
        with pytest.raises(ApiError):
            door.asker({"Authorization": "Bearer other"})
    # A name that nobody vouches for is none.
    assert plain.asker(key | {"x-doherty-tenant": "acme"}) == plain.asker(key)
    assert Door().asker({}) == Asker(Door().asker({}).owner)


async def job_of(store: Store, tenant: str) -> None:
    await begun_job(store, 1, tenant=tenant)


async def test_lines_say_whose_they_are(store_url: str) -> None:
    store = await Store.open(store_url)
    try:
        await job_of(store, "acme")
        chunk = await ask(store)
        assert chunk is not None
        assert [line.tenant for line in chunk.lines] == ["acme"]
    finally:
        await store.close()


async def test_a_store_of_a_former_release_goes_on_with_jobs_of_nobody(tmp_path: Path) -> None:
    path = tmp_path / "offline.db"
    store = await Store.open(path)
    await job_of(store, "")
    await store.close()
    with sqlite3.connect(path) as direct:
        direct.execute("ALTER TABLE jobs DROP COLUMN tenant")
        direct.execute("PRAGMA user_version = 1")
    direct.close()
    assert len(STEPS) > 1
    store = await Store.open(path)
    try:
        chunk = await ask(store)
        assert chunk is not None
        assert [line.tenant for line in chunk.lines] == [""]
    finally:
        await store.close()
