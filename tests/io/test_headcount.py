"""Several workers of one proxy, and a replica that never gets more than it may have."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import msgspec

from proxy.contract import PoolRecord
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json
from tests.fakes.plane import Answer, chat_request, until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask
from tests.fakes.told_manager import ToldManager

MOST = 3


class Crowd:
    """Counts the requests that an engine has at once, and their prompts' octets."""

    def __init__(self) -> None:
        self.now = self.most = self.octets = self.octets_most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, connection: Connection, request: Received) -> None:
        size = len(request.body)
        self.now, self.octets = self.now + 1, self.octets + size
        self.most, self.octets_most = max(self.most, self.now), max(self.octets_most, self.octets)
        await asyncio.sleep(0.002)
        await self.gate.wait()
        self.now, self.octets = self.now - 1, self.octets - size
        await answer_json(connection, b"{}")


def chat(text: str) -> bytes:
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]}
    return chat_request(json.dumps(body).encode(), ("connection: close",))


async def ask_many(port: int, count: int, text: str = "hello") -> list[Answer]:
    return list(await asyncio.gather(*(ask(port, chat(f"{n} {text}")) for n in range(count))))


async def test_several_workers_never_give_a_replica_more_than_it_may_have() -> None:
    crowd = Crowd()
    async with (
        ToldManager() as manager,
        ScriptedEngine(crowd) as engine,
        ProxyProcess("--manager-url", manager.url, "--workers", "3") as proxy,
    ):
        record = msgspec.structs.replace(engine.record("a"), max_inputs=MOST)
        await manager.publish(record)
        await until(lambda: any(r.fleet_version == manager.version for r in manager.reports))
        answers = await ask_many(proxy.port, 100)
        assert {answer.status for answer in answers} == {200}
        assert crowd.most == MOST
        # One that dies with requests on its hands leaves nothing behind that counts.
        crowd.gate.clear()
        asked = asyncio.get_running_loop().create_task(ask_many(proxy.port, 12, "last"))
        await until(lambda: crowd.now == MOST)
        for pid in proxy.workers():
            os.kill(pid, signal.SIGKILL)
        await asyncio.gather(asked, return_exceptions=True)
        crowd.gate.set()
        await until(lambda: crowd.now == 0)
        await until(lambda: len([line for line in proxy.lines if "ended with -9" in line]) == 3)
        assert {answer.status for answer in await ask_many(proxy.port, 10)} == {200}


async def test_several_workers_never_queue_more_tokens_on_a_replica_than_it_may_have() -> None:
    crowd, text = Crowd(), "x" * 4000
    size = len(chat(text).split(b"\r\n\r\n")[1]) + 8
    async with (
        ToldManager() as manager,
        ScriptedEngine(crowd) as engine,
        ProxyProcess("--manager-url", manager.url, "--workers", "3") as proxy,
    ):
        pool = PoolRecord(model="m", pool="m", awake=1, max_tokens=3000)
        await manager.publish(msgspec.structs.replace(engine.record("a"), pool="m"), pools=(pool,))
        await until(lambda: any(r.fleet_version == manager.version for r in manager.reports))
        answers = await ask_many(proxy.port, 40, text)
        assert {answer.status for answer in answers} == {200}
        assert size <= crowd.octets_most <= 3 * size
