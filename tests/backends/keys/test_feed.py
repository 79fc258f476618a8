"""The keys that a manager tells: of a file, or of another region."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from backends import watches
from backends.failure import StartError
from backends.keys.api import KeysApi
from backends.keys.changes import added, revoked
from backends.keys.feed import KEPT_NAME, KeyFeed, KeySource
from backends.keys.file import change
from backends.log import Log
from proxy.config import Config, ManagerConfig, ProxyConfig
from proxy.contract.keys import KEYS_PATH, KEYS_WATCH_PATH, KeyRecord, KeySet, decode_keys

SALT = "s" * 16


def record(number: int) -> KeyRecord:
    return KeyRecord(key_id=f"k{number}", tenant="t", digest=f"{number:064x}")


def add(path: Path, number: int) -> None:
    change(str(path), lambda keys: added(keys, record(number)))


def source(run_dir: Path, *, proxys: Path | None = None, **settings: str) -> KeySource:
    manager = ManagerConfig(run_dir=str(run_dir), **settings)  # type: ignore[arg-type]
    keys_path = None if proxys is None else str(proxys)
    return KeySource(Config(manager=manager, proxy=ProxyConfig(keys_path=keys_path)), Log())


@contextlib.asynccontextmanager
async def running(one: KeySource) -> AsyncIterator[KeyFeed]:
    task = asyncio.get_running_loop().create_task(one.run())
    try:
        assert one.feed is not None
        yield one.feed
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def told(feed: KeyFeed | None, port: int = 0) -> AsyncIterator[str]:
    """Serve the pages of a manager that has these keys; yield its URL."""
    app, api = web.Application(), KeysApi(feed, None)
    app.add_routes(api.routes())
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        api.end_watches()
        await runner.cleanup()


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not seen():
            await asyncio.sleep(0.01)


async def test_a_changed_file_is_told_and_a_broken_one_takes_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    async with running(source(tmp_path, keys_path=str(path))) as feed:
        assert feed.keys is not None
        assert [known.key_id for known in feed.keys.keys] == ["k1"]
        add(path, 2)
        assert await feed.newer(1, 20)
        assert len(feed.keys.keys) == 2
        whole = path.read_bytes()
        for broken in (b"{", b""):
            path.write_bytes(broken)
            assert not await feed.newer(2, 0.5)
        path.unlink()
        assert not await feed.newer(2, 0.5)
        assert len(feed.keys.keys) == 2
        path.write_bytes(whole.replace(b"k2", b"k3"))
        path.chmod(0o600)
        assert await feed.newer(2, 20)
        assert [key.key_id for key in decode_keys(feed.line).keys] == ["k1", "k3"]


def test_a_manager_tells_the_keys_of_its_proxies(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    feed = source(tmp_path, proxys=path).feed
    assert feed is not None
    assert feed.keys is not None
    assert feed.keys.keys == (record(1),)
    assert source(tmp_path).feed is None


def test_a_file_that_cannot_be_used_is_told_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    path.chmod(0o644)
    with pytest.raises(StartError, match=r"keys_path: .*chmod 600"):
        source(tmp_path, keys_path=str(path))


async def test_without_a_file_there_are_no_keys_and_then_there_are(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    async with running(source(tmp_path, keys_path=str(path))) as feed:
        assert feed.keys is not None
        assert not feed.keys.keys
        assert len(feed.keys.salt) >= 16, "what is derived with it may not be guessed"
        add(path, 1)
        assert await feed.newer(1, 20)
        assert [known.key_id for known in feed.keys.keys] == ["k1"]


def test_a_file_that_is_lost_between_two_lives_locks_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    source(tmp_path, keys_path=str(path))
    path.unlink()
    feed = source(tmp_path, keys_path=str(path)).feed
    assert feed is not None
    assert feed.keys is not None
    assert feed.keys.keys == (record(1),)


async def test_a_region_that_follows_knows_the_keys_without_the_other(tmp_path: Path) -> None:
    first, kept = KeyFeed(), tmp_path / KEPT_NAME
    first.publish(KeySet(version=4, salt=SALT, keys=(record(1),)))
    async with told(first) as url, running(source(tmp_path, keys_follow=url)) as feed:
        await until(lambda: feed.keys == first.keys)
        assert first.keys is not None
        first.publish(revoked(first.keys, ["k1"], 5.0))
        await until(lambda: feed.keys == first.keys)
        await until(lambda: b"revoked_at" in kept.read_bytes())
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    # The other region is gone, and this manager begins anew.
    async with running(source(tmp_path, keys_follow=url)) as again:
        assert again.keys == first.keys
        older = KeySet(version=1, salt=SALT, keys=(record(9),))  # restored from a copy
        first.publish(older)
        async with told(first, int(url.rpartition(":")[2])):
            await until(lambda: again.keys == older)


async def test_the_pages_say_whether_there_are_keys_and_whether_they_are_known(
    tmp_path: Path,
) -> None:
    unknown = source(tmp_path, keys_follow="http://127.0.0.1:9").feed
    for feed, status in ((None, 404), (unknown, 503)):
        async with told(feed) as url, aiohttp.ClientSession() as session:
            for page in (KEYS_PATH, KEYS_WATCH_PATH):
                async with session.get(url + page) as answer:
                    assert answer.status == status
    known = KeyFeed()
    known.publish(KeySet(version=4, salt=SALT, keys=(record(1),)))
    async with (
        told(known) as url,
        aiohttp.ClientSession() as session,
        session.get(url + KEYS_PATH) as answer,
    ):
        assert decode_keys(await answer.read()) == known.keys


async def test_a_watch_tells_the_set_then_each_newer_one_and_beats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watches, "HEARTBEAT_INTERVAL_S", 0.05)
    feed = KeyFeed()
    feed.publish(KeySet(version=4, salt=SALT, keys=(record(1),)))
    async with (
        told(feed) as url,
        aiohttp.ClientSession() as session,
        session.get(url + KEYS_WATCH_PATH) as answer,
    ):
        assert json.loads(await answer.content.readline())["version"] == 4
        assert await answer.content.readline() == b"\n"
        assert feed.keys is not None
        assert not feed.publish(feed.keys), "the same set is no news"
        feed.publish(msgspec.structs.replace(feed.keys, version=3))
        while not (line := await answer.content.readline()).strip():
            pass
        assert json.loads(line)["version"] == 3
