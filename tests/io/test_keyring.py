"""Which keys there are, as a supervisor learns it, and that nothing is told before."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from proxy.config import AccessConfig, ProxyConfig, TenantConfig
from proxy.contract import FLEET_WATCH_PATH, FleetSnapshot, encode_snapshot
from proxy.contract.keys import KEYS_WATCH_PATH, KeyRecord, KeySet, encode_keys, follow_token
from proxy.io import keyring
from proxy.io.lookout import Lookout
from proxy.io.tasks import Tasks

SALT = "s" * 16
GONE = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
UNSURE = b"HTTP/1.1 503 Unsure\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
WATCH = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n"


def keys(*ids: str, version: int = 1) -> KeySet:
    records = [KeyRecord(key_id=k, tenant="t", digest=f"{n:064x}") for n, k in enumerate(ids)]
    return KeySet(version=version, salt=SALT, keys=tuple(records))


class Told:
    """What a lookout has told, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._news = asyncio.Event()

    def add(self, event: str) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, seen: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(20):
            while not seen(self.events):
                self._news.clear()
                await self._news.wait()


class Manager:
    """Answers each path with what a test says, and keeps that connection open."""

    def __init__(self) -> None:
        fleet = WATCH + encode_snapshot(FleetSnapshot(epoch="e", version=1)) + b"\n"
        self.answers = {FLEET_WATCH_PATH: fleet, KEYS_WATCH_PATH: GONE}
        self.asked: list[str] = []
        self.heads: list[str] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""

    async def __aenter__(self) -> Manager:  # noqa: PYI034 - as it is used
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    def say(self, path: str, octets: bytes) -> None:
        """Go on with what is watched there."""
        for writer in self.writers:
            if writer.path == path:  # type: ignore[attr-defined]
                writer.write(octets)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1].decode()
        self.asked.append(path)
        self.heads.append(head.decode())
        answer = self.answers[path]
        writer.write(answer)
        if answer.startswith(WATCH):
            writer.path = path  # type: ignore[attr-defined]
            self.writers.append(writer)
        else:
            writer.close()


@contextlib.asynccontextmanager
async def looking(config: ProxyConfig) -> AsyncIterator[tuple[Lookout, Told]]:
    told, tasks = Told(), Tasks()
    lookout = Lookout(
        tasks,
        on_snapshot=lambda snapshot: told.add(f"fleet {snapshot.version}"),
        on_cleared=lambda _: None,
        on_silent=lambda _: None,
        on_keys=lambda k: told.add("keys " + ",".join(key.key_id for key in k.keys)),
        on_jwt_keys=lambda _: None,
    )
    lookout.look(config)
    try:
        yield lookout, told
    finally:
        await tasks.close()
        await lookout.close()


def write(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.chmod(0o600)
    os.replace(new, path)


async def test_a_fleet_is_not_told_before_the_keys_are_known() -> None:
    async with Manager() as manager:
        manager.answers[KEYS_WATCH_PATH] = UNSURE
        async with looking(ProxyConfig(manager_url=manager.url)) as (_, told):
            async with asyncio.timeout(20):
                while manager.asked.count(KEYS_WATCH_PATH) < 2:
                    await asyncio.sleep(0.01)
            assert FLEET_WATCH_PATH in manager.asked
            assert told.events == []
            manager.answers[KEYS_WATCH_PATH] = WATCH + encode_keys(keys("a")) + b"\n"
            await told.until(lambda events: len(events) == 2)
            assert told.events == ["keys a", "fleet 1"]
            manager.say(KEYS_WATCH_PATH, b"\n" + encode_keys(keys("b")) + b"\n")
            await told.until(lambda events: "keys b" in events)


async def test_a_manager_without_keys_says_so_and_the_fleet_is_told() -> None:
    async with (
        Manager() as manager,
        looking(ProxyConfig(manager_url=manager.url)) as (lookout, told),
    ):
        await told.until(lambda events: events == ["fleet 1"])
        assert lookout.keyring.samples() == ([], [])


async def test_keys_that_a_manager_has_lost_stay_in_force(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keyring, "RETRY_FIRST_S", 0.01)
    async with Manager() as manager:
        manager.answers[KEYS_WATCH_PATH] = WATCH + encode_keys(keys("a")) + b"\n"
        async with looking(ProxyConfig(manager_url=manager.url)) as (lookout, told):
            await told.until(lambda events: "keys a" in events)
            manager.answers[KEYS_WATCH_PATH] = GONE
            manager.cut()
            asked = len(manager.asked)
            async with asyncio.timeout(20):
                while manager.asked[asked:].count(KEYS_WATCH_PATH) < 3:
                    await asyncio.sleep(0.01)
            assert [event for event in told.events if event.startswith("keys")] == ["keys a"]
            gauges = {sample.name: sample.value for sample in lookout.keyring.samples()[1]}
            assert (gauges["keys"], gauges["keys_version"]) == (1, 1)
    said = [r.getMessage() for r in caplog.records if "going on with those" in r.getMessage()]
    assert len(said) == 1, "once, however often it is asked in vain"


async def test_a_manager_is_shown_that_this_proxy_has_the_secret_of_all() -> None:
    async with Manager() as manager:
        async with looking(ProxyConfig(manager_url=manager.url, peer_key="shared")) as (_, told):
            await told.until(lambda events: events == ["fleet 1"])
        (head,) = [head for head in manager.heads if KEYS_WATCH_PATH in head]
        assert f"Authorization: Bearer {follow_token('shared')}\r\n" in head.replace(
            "authorization", "Authorization"
        )
        assert "shared" not in "".join(manager.heads)


@pytest.mark.parametrize("line", [b"{}\n", b"[]\n", b'{"version":1,"keys":[]}\n'])
async def test_what_is_no_set_of_keys_opens_nothing(line: bytes) -> None:
    async with Manager() as manager:
        manager.answers[KEYS_WATCH_PATH] = WATCH + line
        async with looking(ProxyConfig(manager_url=manager.url)) as (_, told):
            async with asyncio.timeout(20):
                while manager.asked.count(KEYS_WATCH_PATH) < 2:
                    await asyncio.sleep(0.01)
            assert told.events == []


async def test_a_file_is_read_at_once_and_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    write(path, encode_keys(keys("a")))
    config = ProxyConfig(keys_path=str(path), worker_urls=("http://127.0.0.1:9",))
    async with looking(config) as (lookout, told):
        assert told.events[0] == "keys a", "before anything else, and without waiting"
        write(path, b"{broken")
        async with asyncio.timeout(20):
            while not lookout.keyring.samples()[0][0].value:
                await asyncio.sleep(0.02)
        assert "going on with the keys as before" in caplog.text
        write(path, encode_keys(keys("b", "c", version=2)))
        await told.until(lambda events: "keys b,c" in events)
        gauges = {sample.name: sample.value for sample in lookout.keyring.samples()[1]}
        assert (gauges["keys"], gauges["keys_version"]) == (2, 2)


async def test_another_configuration_names_another_source_and_nothing_is_open_between(
    tmp_path: Path,
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    write(one, encode_keys(keys("a")))
    config = ProxyConfig(keys_path=str(one), worker_urls=("http://127.0.0.1:9",))
    async with looking(config) as (lookout, told):
        lookout.look(ProxyConfig(keys_path=str(other), worker_urls=("http://127.0.0.1:9",)))
        assert [event for event in told.events if event.startswith("keys")] == ["keys a", "keys "]
        write(other, encode_keys(keys("b")))
        await told.until(lambda events: "keys b" in events)


async def test_keys_that_can_never_be_used_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many = [f"k{number}" for number in range(keyring.FLAWS_TOLD_MAX + 2)]
    write(tmp_path / "keys.json", encode_keys(keys(*many)))
    config = ProxyConfig(keys_path=str(tmp_path / "keys.json"))
    async with looking(config) as (lookout, _):
        told = [record.message for record in caplog.records if "not configured" in record.message]
        assert len(told) == keyring.FLAWS_TOLD_MAX
        assert told[0] == "key k0: its tenant 't' is not configured; it is refused"
        assert "so are 2 more keys" in caplog.text
        caplog.clear()
        lookout.look(config)
        assert "not configured" not in caplog.text
        access = AccessConfig(tenants=(TenantConfig(name="t"),))
        lookout.look(msgspec.structs.replace(config, access=access))
        assert "is refused" not in caplog.text
