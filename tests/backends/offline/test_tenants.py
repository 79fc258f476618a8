"""Whose files and jobs are whose, and that a tenant's name reaches the lines of its jobs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from backends.offline.api_errors import ApiError
from backends.offline.schema import STEPS
from backends.offline.store import Store
from backends.offline.tenants import Asker, Door, Rights
from proxy.config_access import TenantConfig
from proxy.contract.behalf import in_field, proof_of
from tests.fakes.offline_stage import CHAT, CONFIG, jsonl, offline_stage, request, until_state
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


def test_jobs_may_ask_for_what_their_tenant_may() -> None:
    rights = Rights([TenantConfig(name="acme", models=("m",)), TenantConfig(name="beta")])
    assert rights.may_ask("acme", "m")
    assert not rights.may_ask("acme", "n")
    assert rights.may_ask("beta", "n")
    assert rights.may_ask("", "n")
    # As the proxy judges their lines: of a tenant that is gone, and of one that was never there.
    assert not rights.may_ask("gone", "m")
    assert not rights.may_ask("default somebody", "m")
    rights.configure([TenantConfig(name="default", models=("m",))])
    assert rights.may_ask("default somebody", "m")
    assert not rights.may_ask("default somebody", "n")
    rights.configure([])
    assert rights.may_ask("acme", "n")


@pytest.mark.parametrize(("models", "code"), [("[]", None), ("[other]", "model_not_found")])
async def test_a_job_for_a_model_of_others_does_not_begin(
    tmp_path: Path, models: str, code: str | None
) -> None:
    """Engine workers would compute its lines, and no proxy would see them."""
    config = CONFIG + (
        f"tenants:\n- {{name: acme, models: {models}}}\n"
        f"proxy: {{internal_key: {SECRET}, keys_path: keys.json}}\n"
    )
    said = fields("acme")
    del said["Authorization"]
    async with (
        offline_stage(tmp_path, config=config) as stage,
        stage.client("c", default_headers=said) as client,
    ):
        file = await client.files.create(file=("a", jsonl([request(0)])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        batch = await until_state(client, batch.id, "in_progress", "failed")
        assert (batch.errors.data[0].code if batch.errors else None) == code


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
