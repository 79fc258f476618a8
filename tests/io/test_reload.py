"""The configuration changes under a running proxy, and nobody who is being served notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.certificates import Authority
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import chat_request, until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk, ask
from tests.io.test_supervisor import EVENT, HeldStreams

RELOADED = r"reloaded; changed: (.*)"


class File:
    """The proxy's section of a configuration file, written as a whole."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.path = folder / "doherty.yaml"
        self.write(**settings)

    def write(self, **settings: Any) -> None:
        self.put(json.dumps({"proxy": settings}))

    def put(self, text: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.path)

    @property
    def flags(self) -> tuple[str, str]:
        return "--config", str(self.path)


def keyed(key: str) -> bytes:
    return chat_request(fields=[f"authorization: Bearer {key}"])


async def test_a_changed_file_goes_into_force_and_streams_go_on(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine, ScriptedEngine() as second:
        file = File(tmp_path, worker_urls=[engine.url], api_key="one")
        async with (
            ProxyProcess(*file.flags, "--workers", "2") as proxy,
            Talk(proxy.port) as kept,
        ):
            held = HeldStreams()
            await kept.send(keyed("one"))
            assert (await kept.answer()).status == 200
            engine.script = held.script
            async with Talk(proxy.port) as stream:
                await stream.send(keyed("one"))
                await stream.read_until(EVENT)
                workers = proxy.workers()
                file.write(
                    worker_urls=[second.url, engine.url],
                    api_key="two",
                    policy="round_robin",
                    max_payload_size=500,
                    expose_routing=True,
                    log_level="debug",
                )
                changed = (await proxy.until_said(RELOADED))[1]
                assert changed == (
                    "worker_urls, policy, api_key, max_payload_size, log_level, expose_routing"
                )
                assert "one" not in "".join(proxy.lines[-3:])
                while (await ask(proxy.port, keyed("one"))).status != 401:
                    await asyncio.sleep(0.01)
                held.release.set()
                await stream.read_until(b"0\r\n\r\n")
            while len(await proxy.replicas()) < 2 or any(
                entry["state"] != "ready" for entry in (await proxy.replicas()).values()
            ):
                await asyncio.sleep(0.01)
            got = [await ask(proxy.port, keyed("two")) for _ in range(8)]
            assert {answer.status for answer in got} == {200}
            assert second.requests
            assert all("x-doherty-replica" in answer.fields for answer in got)
            assert (await ask(proxy.port, chat_request(b"x" * 501))).status in (401, 413)
            await kept.send(keyed("two"))  # its connection has outlived the change
            assert (await kept.answer()).status == 200
            assert proxy.workers() == workers


async def test_a_replica_that_stays_in_the_list_serves_throughout(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine:
        file = File(tmp_path, worker_urls=[engine.url])
        async with ProxyProcess(*file.flags) as proxy:
            statuses: list[int] = []
            for number in range(3):
                said = len(proxy.lines)
                file.write(worker_urls=[engine.url], max_concurrent_requests=100 + number)
                proxy.signal(signal.SIGHUP)
                heard = asyncio.ensure_future(proxy.until_said(RELOADED, said))
                while not heard.done():
                    statuses.append((await ask(proxy.port, chat_request())).status)
                await heard
            assert set(statuses) == {200}


async def test_a_file_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine:
        file = File(tmp_path, worker_urls=[engine.url])
        async with ProxyProcess(*file.flags) as proxy:
            for text, problem in (
                ("proxy:\n  wrokers: 2\n", r"doherty.yaml:2: .*'wrokers'"),
                ("proxy: {policy: [", r"doherty.yaml:\d: not valid YAML"),
                ("proxy: {}", r"the replica list is empty"),
                ("proxy: {worker_urls: ['x:1']}", r"'x:1' must look like"),
                (
                    f"proxy: {{worker_urls: ['{engine.url}'], offline_url: 'ftp://x'}}",
                    r"--offline-url 'ftp://x' must look like",
                ),
                (f"proxy: {{worker_urls: ['{engine.url}'], tls_cert_path: /none}}", "tls_key_path"),
            ):
                said = len(proxy.lines)
                file.put(text)
                proxy.signal(signal.SIGHUP)
                await proxy.until_said("not reloaded, going on as before: .*" + problem, said)
                assert (await ask(proxy.port, chat_request())).status == 200
            file.write(worker_urls=[engine.url], policy="random")
            assert (await proxy.until_said(RELOADED))[1] == "policy"


async def test_flags_still_win_and_what_must_wait_is_named(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine:
        file = File(tmp_path, worker_urls=[engine.url])
        flags = ("--policy", "random")
        async with ProxyProcess(*file.flags, *flags) as proxy:
            settings = {"policy": "session", "workers": 3, "admin_api_key": "k", "port": 9}
            file.write(worker_urls=[engine.url], expose_routing=True, **settings)
            assert (await proxy.until_said(RELOADED))[1] == "expose_routing"
            await proxy.until_said("workers, admin_api_key: a change of this needs an upgrade")
            assert (await proxy.admin("/metrics")).status == 200
            assert await proxy.metric("doherty_workers") == 1


async def test_sighup_opens_the_access_log_anew(tmp_path: Path) -> None:
    log, old = tmp_path / "access.log", tmp_path / "access.log.1"
    async with (
        ScriptedEngine() as engine,
        ProxyProcess(
            *("--worker-urls", engine.url, "--access-log", str(log), "--workers", "2")
        ) as proxy,
    ):
        for _ in range(4):
            assert (await ask(proxy.port, chat_request())).status == 200
        log.rename(old)
        proxy.signal(signal.SIGHUP)
        await proxy.until_said(r"reloaded; changed: nothing")
        await until(log.exists)
        for worker in proxy.workers():
            await until(lambda worker=worker: open_files(worker) >= {str(log)} - {str(old)})
        for _ in range(4):
            assert (await ask(proxy.port, chat_request())).status == 200
        await until(lambda: len(log.read_text().splitlines()) == 4)
        assert len(old.read_text().splitlines()) == 4
        assert await proxy.metric("doherty_access_log_dropped_total") == 0


def open_files(pid: int) -> set[str]:
    folder = Path(f"/proc/{pid}/fd")
    return {os.readlink(entry) for entry in folder.iterdir() if entry.exists()}


class Secured:
    """A proxy with TLS on both sides, and two authorities that come and go."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = Authority(folder, "old"), Authority(folder, "new")
        self.cert, self.key = self.old.issue("proxy")
        self.trusted = folder / "trusted.pem"  # by the proxy, of its replicas
        self.trust(self.old)
        self.engine = ScriptedEngine(context=self.old.server_context())

    def trust(self, *authorities: Authority) -> None:
        self.trusted.write_bytes(b"".join(Path(each.path).read_bytes() for each in authorities))

    @contextlib.asynccontextmanager
    async def proxy(self) -> AsyncIterator[ProxyProcess]:
        pair = ("--tls-cert-path", self.cert, "--tls-key-path", self.key)
        flags = (*pair, "--ca-cert-path", str(self.trusted), "--workers", "2")
        async with (
            self.engine,
            ProxyProcess("--worker-urls", self.engine.url, *flags) as proxy,
        ):
            await proxy.until_said("listening on https://")
            await proxy.until_said("serves m")
            yield proxy
            assert not [line for line in proxy.lines if "Traceback" in line]


async def test_certificates_are_read_again_when_they_change(tmp_path: Path) -> None:
    site = Secured(tmp_path)
    trusting_old, trusting_new = site.old.client_context(), site.new.client_context()
    async with site.proxy() as proxy:
        held = HeldStreams()
        assert (await ask(proxy.port, chat_request(), context=trusting_old)).status == 200
        site.engine.script = held.script
        async with Talk(proxy.port, trusting_old) as stream:
            await stream.send(chat_request())
            await stream.read_until(EVENT)
            said = len(proxy.lines)
            site.new.issue("proxy")  # in place of the files that are in force
            await proxy.until_said(RELOADED, said)  # nobody had to say so
            while True:
                try:
                    async with Talk(proxy.port, trusting_new):
                        break
                except ssl.SSLError:
                    await asyncio.sleep(0.01)
            held.release.set()
            await stream.read_until(b"0\r\n\r\n")
        # Half a change is not taken.
        said = len(proxy.lines)
        Path(site.key).write_text("torn")
        await proxy.until_said("not reloaded.*tls_key_path: .* holds no private key", said)
        async with Talk(proxy.port, trusting_new):
            pass
        async with Talk(proxy.port) as plain:
            await plain.send(chat_request())
            assert not await plain.read_to_end()
        failed = await proxy.metric("doherty_tls_handshakes_failed_total", reason="plain_http")
        assert failed == 1


async def test_workers_and_probes_believe_whom_the_reload_says(tmp_path: Path) -> None:
    site = Secured(tmp_path)
    context = site.old.client_context()
    async with site.proxy() as proxy:
        said = len(proxy.lines)
        site.trust(site.new)
        await proxy.until_said(RELOADED, said)
        while (got := await ask(proxy.port, chat_request(), context=context)).status == 200:
            await asyncio.sleep(0.01)  # the other worker has not heard yet
        assert got.status == 502
        assert "certificate is not accepted" in json.loads(got.body)["error"]["message"]
        await proxy.until_said(r"is suspect: its certificate is not accepted", said)
        assert site.engine.probes == 0
        site.trust(site.old, site.new)
        proxy.signal(signal.SIGHUP)
        await proxy.until_said("answers again", said)
        assert site.engine.probes == 1
        while (await ask(proxy.port, chat_request(), context=context)).status != 200:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["expired", "mismatch"])
async def test_a_start_tells_of_bad_certificates(tmp_path: Path, how: str) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("proxy", expired=how == "expired")
    other = authority.issue("other")[1]
    pair = ("--tls-cert-path", cert, "--tls-key-path", key if how == "expired" else other)
    proxy = await ProxyProcess("--worker-urls", "http://127.0.0.1:9", *pair).start()
    if how == "expired":
        await proxy.until_said("tls_cert_path: the certificate in .* expired on")
        await proxy.until_said("listening on https://")
    else:
        assert await proxy.ended() == 2
        assert "is not that of the certificate" in "\n".join(proxy.lines)
    await proxy.__aexit__()
