"""Where other regions follow the keys: nothing else is there, and not everybody comes in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from backends.failure import StartError
from backends.keys.changes import added
from backends.keys.file import change
from backends.keys.source import Keys, told_keys
from backends.log import Log
from proxy.config import Config, ManagerConfig, ProxyConfig
from proxy.contract import FLEET_PATH
from proxy.contract.keys import KEYS_PATH, KEYS_WATCH_PATH, KeyRecord, follow_token
from tests.fakes.certificates import Authority

RECORD = KeyRecord(key_id="k1", tenant="t", digest="1" * 64)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def config(run_dir: Path, proxy: dict[str, Any], **manager: str) -> Config:
    settings = ManagerConfig(run_dir=str(run_dir), **manager)  # type: ignore[arg-type]
    return Config(manager=settings, proxy=msgspec.convert(proxy, ProxyConfig))


@contextlib.asynccontextmanager
async def running(one: Config) -> AsyncIterator[Keys]:
    with told_keys(one, Log()) as keys:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(chore) for chore in keys.chores()]
            try:
                yield keys
            finally:
                for task in tasks:
                    task.cancel()


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "keys.json")
    change(path, lambda keys: added(keys, RECORD))
    return path


async def until_known(keys: Keys) -> None:
    assert keys.feed is not None
    async with asyncio.timeout(20):
        while keys.feed.keys is None:
            await asyncio.sleep(0.01)


async def test_a_region_follows_over_tls_with_the_key_of_all(tmp_path: Path, path: str) -> None:
    authority, address = Authority(tmp_path), free_address()
    chain, private = authority.issue("localhost")
    served = {"peer_key": "shared", "tls_cert_path": chain, "tls_key_path": private}
    here = config(tmp_path, served, keys_path=path, keys_listen=address)
    url = f"https://localhost:{address.rpartition(':')[2]}"
    trusts = {"peer_key": "shared", "ca_cert_path": authority.path}
    async with running(here), running(config(tmp_path, trusts, keys_follow=url)) as there:
        await until_known(there)
        assert there.feed is not None
        assert there.feed.keys is not None
        assert there.feed.keys.keys == (RECORD,)


async def test_nobody_else_comes_in_and_nothing_else_is_there(tmp_path: Path, path: str) -> None:
    address = free_address()
    here = config(tmp_path, {"peer_key": "shared"}, keys_path=path, keys_listen=address)
    right = {"authorization": f"Bearer {follow_token('shared')}"}
    async with running(here), aiohttp.ClientSession() as session:
        for page, headers, status in (
            (KEYS_PATH, right, 200),
            (FLEET_PATH, right, 404),
            ("/v1/replicas/a/drain", right, 404),
            (KEYS_PATH, {}, 401),
            (KEYS_WATCH_PATH, {"authorization": "Bearer shared"}, 401),
            (KEYS_WATCH_PATH, {"authorization": f"Bearer {follow_token('other')}"}, 401),
            ("/nowhere", {}, 404),
        ):
            async with session.get(f"http://{address}{page}", headers=headers) as answer:
                assert answer.status == status, page
                assert (RECORD.digest in await answer.text()) == (status == 200)


@pytest.mark.parametrize(
    ("proxy", "manager", "words"),
    [
        ({}, {"keys_listen": "127.0.0.1:1"}, "there are no keys to tell"),
        ({"keys_path": "PATH"}, {"keys_listen": "127.0.0.1:1"}, "set proxy.peer_key"),
        ({"keys_path": "PATH", "peer_key": "k"}, {"keys_listen": "here"}, "look like HOST:PORT"),
        (
            {"keys_path": "PATH", "peer_key": "k", "tls_cert_path": "none.pem"},
            {"keys_listen": "127.0.0.1:0"},
            "tls_",
        ),
    ],
)
def test_what_cannot_be_opened_is_told_before_anything_starts(
    tmp_path: Path, path: str, proxy: dict[str, Any], manager: dict[str, str], words: str
) -> None:
    named = {name: path if value == "PATH" else value for name, value in proxy.items()}
    with (
        pytest.raises(StartError, match=words),
        told_keys(config(tmp_path, named, **manager), Log()),
    ):
        pass


def test_a_port_in_use_is_told(tmp_path: Path, path: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        one = config(tmp_path, {"peer_key": "k"}, keys_path=path, keys_listen=address)
        with pytest.raises(StartError, match="cannot be used"), told_keys(one, Log()):
            pass
