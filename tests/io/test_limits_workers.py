"""Limits of tenants over the workers of real proxies: exact, through deaths, reloads, upgrades."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from proxy.contract.usage import decode_usage
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json
from tests.fakes.plane import Answer, chat_request, until
from tests.fakes.proxy_process import ProxyProcess, alive
from tests.fakes.talk import ask

KEY = "key-of-a-tenant"
USAGE = b'{"usage":{"prompt_tokens":10,"completion_tokens":20}}'


class Engine:
    """Answers with thirty tokens each; counts who is there at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, connection: Connection, request: Received) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.002)
            await self.gate.wait()
        finally:
            self.now -= 1
        await answer_json(connection, USAGE)


def configure(folder: Path, url: str, more: dict[str, Any] | None = None, **tenant: Any) -> Path:
    """Write the configuration of a proxy with one tenant, and its key."""
    folder.mkdir(exist_ok=True)
    path, keys = folder / "doherty.json", folder / "keys.json"
    record = {"key_id": "k", "tenant": "t", "digest": sha256(KEY.encode()).hexdigest()}
    if not keys.exists():
        keys.touch(0o600)
        keys.write_text(
            json.dumps({"version": 1, "salt": "a salt of a test, no more", "keys": [record]})
        )
    proxy = {
        "worker_urls": [url],
        "workers": 3,
        "keys_path": str(keys),
        "usage_log": str(folder / "usage.jsonl"),
        "quota_path": str(folder / "day.json"),
        **(more or {}),
    }
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"proxy": proxy, "tenants": [{"name": "t", **tenant}]}))
    fresh.rename(path)
    return path


async def ask_many(port: int, count: int) -> list[Answer]:
    body = b'{"model":"m","max_tokens":20,"messages":[{"role":"user","content":"hello"}]}'
    fields = ("connection: close", f"authorization: Bearer {KEY}")
    return list(
        await asyncio.gather(*(ask(port, chat_request(body, fields)) for _ in range(count)))
    )


def statuses(answers: list[Answer]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


async def serve(port: int, count: int) -> int:
    """Ask until so many were served, or nobody is."""
    served = last = 0
    while served < count:
        answers = statuses(await ask_many(port, 30))
        assert set(answers) <= {200, 429}
        last, served = answers[200], served + answers[200]
        if not last:
            break
    return served


async def test_workers_together_let_in_what_a_tenant_may_have(tmp_path: Path) -> None:
    engine, now_s = Engine(), asyncio.get_running_loop().time
    async with ScriptedEngine(engine) as replica:
        path = configure(tmp_path, replica.url, requests_per_min=40, max_concurrent=7)
        async with ProxyProcess("--config", str(path)) as proxy:
            begun_s = now_s()
            served = await serve(proxy.port, 40)
            (answer,) = await ask_many(proxy.port, 1)
            if now_s() - begun_s < 55.0:  # else a minute is over on a machine that stood still
                assert served == 40
                error = json.loads(answer.body)["error"]
                assert error["code"] == "rate_limit_exceeded"
                assert "Limit 40, Used 40" in error["message"]
                assert 1 <= int(answer.fields["retry-after"]) <= 61
                assert answer.fields["x-ratelimit-remaining-requests"] == "0"
            assert engine.most <= 7
            # A worker that dies takes nothing of the day with it, and other limits count at once.
            os.kill(proxy.workers()[0], signal.SIGKILL)
            await proxy.until_said(r"worker \d+ .* ended with -9")
            said = len(proxy.lines)
            allowed = 30 * served + 310
            configure(tmp_path, replica.url, tokens_per_day=allowed, max_concurrent=7)
            await proxy.until_said("reloaded; changed: access", said)
            async with asyncio.timeout(20):
                more = 0
                while more < 10:
                    more += await serve(proxy.port, 10 - more)
            assert statuses(await ask_many(proxy.port, 6)) == {429: 6}
            refused = await proxy.metric("doherty_tenant_rate_limited_total", tenant="t")
            assert refused >= 6
            assert engine.most <= 7


@pytest.mark.faults
async def test_what_a_dead_worker_had_running_counts_no_more(tmp_path: Path) -> None:
    engine = Engine()
    async with ScriptedEngine(engine) as replica:
        path = configure(tmp_path, replica.url, max_concurrent=4)
        async with ProxyProcess("--config", str(path)) as proxy:
            engine.gate.clear()
            asked = asyncio.get_running_loop().create_task(ask_many(proxy.port, 20))
            await until(lambda: engine.now == 4)
            for pid in proxy.workers():
                os.kill(pid, signal.SIGKILL)
            await asyncio.gather(asked, return_exceptions=True)
            engine.gate.set()
            await until(lambda: engine.now == 0)
            await until(lambda: sum("ended with -9" in line for line in proxy.lines) == 3)
            await until(lambda: len(proxy.workers()) == 3)
            assert statuses(await ask_many(proxy.port, 4)) == {200: 4}


@pytest.mark.faults
async def test_a_day_goes_on_through_an_upgrade_and_a_new_start(tmp_path: Path) -> None:
    async with ScriptedEngine(Engine()) as replica:
        path = configure(tmp_path, replica.url, tokens_per_day=300)
        async with ProxyProcess("--config", str(path)) as proxy:
            assert statuses(await ask_many(proxy.port, 4)) == {200: 4}  # 120 tokens
            left = await proxy.upgrade()
            await until(lambda: not alive(left))  # so that nobody but the new one answers
            assert await proxy.metric("doherty_tenant_day_tokens", tenant="t") == 120
            assert statuses(await ask_many(proxy.port, 3)) == {200: 3}
            proxy.signal(signal.SIGTERM)
            await until(lambda: not alive(proxy.pid))
        assert json.loads((tmp_path / "day.json").read_text())["tenants"]["t"][0] == 210
        async with ProxyProcess("--config", str(path)) as proxy:
            async with asyncio.timeout(20):
                served = 0
                while served < 3:
                    served += statuses(await ask_many(proxy.port, 1))[200]
            (answer,) = await ask_many(proxy.port, 1)
            assert answer.status == 429
            assert json.loads(answer.body)["error"]["code"] == "insufficient_quota"
            assert answer.fields["x-should-retry"] == "false"
            proxy.signal(signal.SIGTERM)  # it writes what waits
            await until(lambda: not alive(proxy.pid))
    records = [decode_usage(line) for line in (tmp_path / "usage.jsonl").read_bytes().splitlines()]
    assert len(records) == 10
    assert {(r.tenant, r.key_id, r.prompt_tokens, r.completion_tokens) for r in records} == {
        ("t", "k", 10, 20)
    }
    assert KEY not in (tmp_path / "usage.jsonl").read_text()


async def test_two_proxies_count_together(tmp_path: Path) -> None:
    sockets = [f"unix:{tmp_path / name}" for name in ("one.sock", "other.sock")]
    async with ScriptedEngine(Engine()) as replica, AsyncExitStack() as stack:
        proxies = []
        for place, name in zip(sockets, ("one", "other"), strict=True):
            more = {"peer_listen": place, "peers": sockets, "workers": 1}
            path = configure(tmp_path / name, replica.url, more, tokens_per_day=340)
            proxies.append(await stack.enter_async_context(ProxyProcess("--config", str(path))))
        one, other = proxies
        assert statuses(await ask_many(one.port, 4)) == {200: 4}
        async with asyncio.timeout(20):
            while await other.metric("doherty_tenant_day_tokens", tenant="t") < 120:
                await asyncio.sleep(0.01)
        served = 0
        while served < 7:  # of eleven of thirty tokens, and a prompt that is believed longer
            served += await serve(other.port, 7 - served)
        assert served == 7
        async with asyncio.timeout(20):
            while await one.metric("doherty_tenant_day_tokens", tenant="t") < 330:
                await asyncio.sleep(0.01)
        for proxy in proxies:
            assert statuses(await ask_many(proxy.port, 3)) == {429: 3}
