"""Tenants and keys change under a running proxy of several workers, and nobody has to reconnect."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from backends.keys.changes import added, revoked
from backends.keys.file import change
from proxy.contract.keys import KeyRecord
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk

CONNECTIONS = 8  # that two workers share them out is all but certain
RELOADED, KEPT = r"reloaded; changed: access", r"not reloaded, going on as before"


class Files:
    """The configuration and the keys of a proxy."""

    def __init__(self, folder: Path, url: str) -> None:
        self.path, self.keys = folder / "doherty.json", folder / "keys.json"
        self._proxy = {"worker_urls": [url], "workers": 2, "keys_path": str(self.keys)}

    def write(self, *tenants: dict[str, Any]) -> None:
        self.put(json.dumps({"proxy": self._proxy, "tenants": tenants}))

    def put(self, text: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.path)

    def add(self, key: str, tenant: str) -> None:
        digest = sha256(key.encode()).hexdigest()
        record = KeyRecord(key_id=key, tenant=tenant, digest=digest)
        change(str(self.keys), lambda keys: added(keys, record))

    def revoke(self, key: str) -> None:
        change(str(self.keys), lambda keys: revoked(keys, [key], 1.0))


def bearer(key: str) -> bytes:
    return f"authorization: Bearer {key}\r\n".encode()


async def statuses(talks: Sequence[Talk], key: str) -> set[int]:
    """Ask over each connection; return what the answers were."""
    found = set()
    for talk in talks:
        await talk.send(b"GET /v1/models/m HTTP/1.1\r\nhost: p\r\n" + bearer(key) + b"\r\n")
        found.add((await talk.answer("GET")).status)
    return found


async def become(talks: Sequence[Talk], key: str, status: int) -> None:
    async with asyncio.timeout(30):
        while await statuses(talks, key) != {status}:
            await asyncio.sleep(0.01)


async def test_tenants_and_keys_change_without_a_restart_and_bad_files_change_nothing(
    tmp_path: Path,
) -> None:
    async with ScriptedEngine() as engine, AsyncExitStack() as stack:
        files = Files(tmp_path, engine.url)
        files.write({"name": "a", "models": ["other"]})
        files.add("key-one", "a")
        flags = ("--config", str(files.path))
        proxy = await stack.enter_async_context(ProxyProcess(*flags))
        talks = [await stack.enter_async_context(Talk(proxy.port)) for _ in range(CONNECTIONS)]
        assert await statuses(talks, "key-one") == {404}, "its tenant has no such model"
        # The policy of a tenant, then one more tenant and its key, over the same connections.
        files.write({"name": "a"})
        await proxy.until_said(RELOADED)
        await become(talks, "key-one", 200)
        assert await statuses(talks, "key-two") == {401}
        files.add("key-two", "b")
        files.write({"name": "a"}, {"name": "b"})
        await become(talks, "key-two", 200)
        # A faulty file leaves both as they were, also when it is ordered to be read.
        said = len(proxy.lines)
        files.put('{"tenants": [{"name": "a"}, {"name": "a"}]}')
        proxy.signal(signal.SIGHUP)
        assert "defined twice" in (await proxy.until_said(rf"{KEPT}.*", said))[0]
        files.keys.write_bytes(b"{")
        await proxy.until_said("going on with the keys as before", said)
        assert await statuses(talks, "key-one") == await statuses(talks, "key-two") == {200}
        # A good one again, in which one key is revoked and one has lost its tenant.
        files.keys.unlink()
        files.add("key-one", "a")
        files.add("key-two", "b")
        files.revoke("key-one")
        await become(talks, "key-one", 401)
        assert await statuses(talks, "key-two") == {200}
        files.write({"name": "a"})
        await become(talks, "key-two", 401)
        assert await proxy.metric("doherty_keys") == 2
        # A worker that takes the place of a dead one has been told the same.
        os.kill(proxy.workers()[0], signal.SIGKILL)
        await proxy.until_said(r"worker \d .* ended with")
        await until(lambda: len(proxy.workers()) == 2)
        fresh = [await stack.enter_async_context(Talk(proxy.port)) for _ in range(CONNECTIONS)]
        assert await statuses(fresh, "key-one") == {401}
        assert "key-one" not in "".join(proxy.lines)
