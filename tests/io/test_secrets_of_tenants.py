"""A tenant's key is in no log, metric, error, trace, account or listing, and in no engine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from tests.fakes import provider_of_tokens as provider
from tests.fakes.engine import ScriptedEngine, streaming
from tests.fakes.plane import Answer, Bench, chat_request
from tests.fakes.provider_of_tokens import OTHER_RSA, RSA, jwk, jwks
from tests.fakes.proxy_process import ROOT, ProxyProcess
from tests.fakes.talk import Talk, ask
from tests.io.test_secrets import SCRIPTS, heads

MASTER, ADMIN = "canary-master-1f0a", "canary-admin-2e1b"
GOOD, REVOKED, EXPIRED, STRANGE, UNKNOWN = (
    f"canary-key-{name}-{number:04x}"
    for number, name in enumerate(("good", "revoked", "expired", "strange", "unknown"))
)
ISSUER = "https://issuer.example"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'


def token(key: object = RSA, tenant: str = "acme", **more: object) -> str:
    content = provider.claims(ISSUER, sub=tenant, email="canary-claim@example.com", **more)
    return provider.token(content, key)


TOKENS = [
    token(),
    token(OTHER_RSA),
    token(tenant="canary-tenant"),
    token(exp=int(time.time()) - 900),
    provider.by_hand({"alg": "none", "x": "canary-header"}, provider.claims(ISSUER), b"signed"),
]
KEYS = (GOOD, REVOKED, EXPIRED, STRANGE, UNKNOWN)
SECRETS = [
    *KEYS,
    *(sha256(key.encode()).hexdigest() for key in (*KEYS, MASTER)),
    *(token.partition(".")[2] for token in TOKENS),
    *(token.rpartition(".")[2] for token in TOKENS),
    *(MASTER, ADMIN, "canary-claim", "canary-tenant", "canary-header", "canary-salt"),
]


def write_keys(path: Path, *, without: str = "") -> None:
    owners = {GOOD: {}, REVOKED: {"revoked_at": 1.0}, EXPIRED: {"expires_at": 1.0}, STRANGE: {}}
    keys = [
        {
            "key_id": f"id{number}",
            "tenant": "nobody" if key == STRANGE else "acme",
            "digest": sha256(key.encode()).hexdigest(),
            **more,
        }
        for number, (key, more) in enumerate(owners.items())
        if key != without
    ]
    replace(path, json.dumps({"version": 1, "salt": "canary-salt-0123", "keys": keys}))


def replace(path: Path, text: str) -> None:
    """Write a file as keys are written: whole, or not at all, and for nobody else."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(text)
    os.replace(new, path)


def setting(folder: Path, engine: ScriptedEngine) -> Path:
    write_keys(folder / "keys.json")
    (folder / "jwks.json").write_bytes(jwks(jwk(RSA, "one")))
    config = folder / "doherty.yaml"
    config.write_text(
        f"""\
tenants:
  - {{name: acme, requests_per_min: 1000, tokens_per_min: 1000000, cache_isolation: true}}
jwt: {{issuer: '{ISSUER}', audience: doherty, jwks_path: {folder}/jwks.json}}
proxy:
  worker_urls: ['{engine.url}']
  workers: 2
  api_key: {MASTER}
  admin_api_key: {ADMIN}
  keys_path: {folder}/keys.json
  access_log: {folder}/access.log
  usage_log: {folder}/usage.log
  log_level: debug
  expose_routing: true
"""
    )
    return config


async def run(*command: str) -> bytes:
    """Return all that a command of `doherty` says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "backends.cli", *command),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    return (await process.communicate())[0]


class Heard:
    """What clients and admins were told, heads and bodies."""

    def __init__(self, proxy: ProxyProcess) -> None:
        self.proxy = proxy
        self.all: list[bytes] = []

    def keep(self, got: Answer) -> int:
        self.all += [got.body, repr(got.fields).encode()]
        return got.status

    async def chat(self, *fields: str, body: bytes = BODY) -> int:
        return self.keep(await ask(self.proxy.port, chat_request(body, fields)))

    async def until(self, status: int, key: str) -> None:
        """What is told reaches workers a little later, and a suspect replica comes back so."""
        while await self.chat(f"authorization: Bearer {key}") != status:
            await asyncio.sleep(0.01)


async def judged_heads(heard: Heard) -> None:
    """Right and wrong keys and tokens, in right and wrong places."""
    for key, expected in ((GOOD, 200), (MASTER, 200), (REVOKED, 401), (EXPIRED, 401)):
        assert await heard.chat(f"authorization: Bearer {key}") == expected
        assert await heard.chat(f"x-api-key: {key}") == expected
    for key in (STRANGE, UNKNOWN):
        assert await heard.chat(f"authorization: Bearer {key}") == 401
        assert await heard.chat(f"authorization: Basic {key}") == 401
    assert await heard.chat(f"authorization: Bearer {GOOD}", f"x-api-key: {UNKNOWN}") == 401
    for shown, expected in zip(TOKENS, (200, 401, 401, 401, 401), strict=True):
        assert await heard.chat(f"authorization: Bearer {shown}") == expected
    for request in heads(GOOD):
        async with Talk(heard.proxy.port) as talk:
            await talk.send(request)
            status = heard.keep(await talk.answer(request.split(b" ")[0].decode()))
            assert 400 <= status < 500
    query = chat_request(BODY, [f"authorization: Bearer {GOOD}"]).replace(
        b"completions ", b"completions?api_key=%b " % GOOD.encode()
    )
    assert heard.keep(await ask(heard.proxy.port, query)) == 200


async def failing_engines(heard: Heard, engine: ScriptedEngine) -> None:
    keyed = f"authorization: Bearer {GOOD}"
    for script in SCRIPTS:
        engine.script = script
        while await heard.chat(keyed, "x-doherty-explain: 1") == 503:
            await asyncio.sleep(0.005)
    await heard.chat(keyed, body=BODY[:-1])
    await heard.chat(keyed, body=BODY.replace(b'"m"', b'"other"'))


async def crash(heard: Heard, engine: ScriptedEngine) -> None:
    """Workers die with keys in their memory: while they relay, and as they would by a fault."""
    engine.script = streaming(b"data: {}\n\n", then=lambda _: asyncio.sleep(30))
    async with AsyncExitStack() as stack:
        refused = b"HTTP/1.1 503"  # by a worker to which the replica is suspect still
        talk = None
        while talk is None or talk.received.startswith(refused):
            talk = await stack.enter_async_context(Talk(heard.proxy.port))
            await talk.send(chat_request(BODY, [f"authorization: Bearer {GOOD}"]))
            assert await talk.read()
        await talk.read_until(b"data: {}")
        for pid, number in zip(
            heard.proxy.workers(), (signal.SIGSEGV, signal.SIGABRT), strict=True
        ):
            said = len(heard.proxy.lines)
            os.kill(pid, number)
            await heard.proxy.until_said(rf"\(pid {pid}\) ended with -{int(number)}", said)
        heard.all.append(await talk.read_to_end())
    engine.script = SCRIPTS[0]


async def reports(heard: Heard, folder: Path) -> None:
    proxy = heard.proxy
    for page in ("/metrics", "/replicas"):
        heard.keep(await proxy.admin(page, ADMIN))
        assert heard.keep(await proxy.admin(page, GOOD)) == 401
    line = f"POST /debug/route HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {ADMIN}\r\n"
    line += f"x-api-key: {GOOD}\r\ncontent-length: {len(BODY)}\r\nconnection: close\r\n\r\n"
    assert heard.keep(await ask(proxy.admin_port, line.encode() + BODY)) == 200
    heard.all.append(await run("check", str(folder / "doherty.yaml")))
    assert b"yaml: ok" in heard.all[-1]
    for command in (("list", "--json"), ("revoke", "id0")):
        heard.all.append(await run("keys", *command, "--keys", str(folder / "keys.json")))
        assert b"id0" in heard.all[-1]
    for pid in (proxy.pid, *proxy.workers()):
        heard.all += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]


async def test_keys_of_tenants_are_nowhere(tmp_path: Path) -> None:
    async with asyncio.timeout(90), ScriptedEngine() as engine:
        config = setting(tmp_path, engine)
        async with ProxyProcess("--config", str(config), "--access-log", f"{tmp_path}/access.log",
                                folder=ROOT) as proxy:  # fmt: skip
            heard = Heard(proxy)
            await heard.until(200, TOKENS[0])
            await judged_heads(heard)
            await failing_engines(heard, engine)
            await crash(heard, engine)
            for shown in (GOOD, TOKENS[0]):  # those that came in their places know both
                await heard.until(200, shown)
            # Whoever edits the file by hand may paste the key itself.
            replace(tmp_path / "keys.json", json.dumps({"keys": [{"key_id": "x", "tenant": "acme",
                    "digest": UNKNOWN}], GOOD: 1}))  # fmt: skip
            await proxy.until_said("going on with the keys as before")
            await heard.until(200, GOOD)
            write_keys(tmp_path / "keys.json")
            await reports(heard, tmp_path)
            await heard.until(401, GOOD)
            proxy.process.terminate()
            assert await proxy.ended() == 0
            heard.all += [line.encode() for line in proxy.lines] + [proxy.output]
            engines = b"\n".join(got.head + got.body for got in engine.requests)
    files = {name: (tmp_path / name).read_bytes() for name in ("access.log", "usage.log")}
    assert b'"tenant":"acme"' in files["usage.log"].replace(b" ", b"")
    everything = b"\n".join([*heard.all, *files.values()])
    assert b"doherty_requests_total" in everything
    assert {secret for secret in SECRETS if secret.encode() in everything} == set()
    # Engines get the proxy's own key, and nothing of a tenant's.
    assert f"authorization: Bearer {MASTER}".encode() in engines
    assert {secret for secret in SECRETS if secret.encode() in engines} == {MASTER}
    assert not list(ROOT.glob("core*"))


async def test_a_fault_of_the_proxy_itself_says_nothing_of_who_asked(
    make_bench: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    bench = make_bench(api_key=GOOD)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    for name in ("read", "admit"):
        monkeypatch.setattr(bench.plane, name, fail)
        client = bench.client()
        client.send(chat_request(BODY, [f"authorization: Bearer {GOOD}"]))
        got = client.answer()
        assert got.status == 500
        assert GOOD.encode() not in client.received
    assert "a fault" in caplog.text
    assert GOOD not in caplog.text
    assert bench.plane.telemetry.internal_errors_total == 2
    bench.plane.telemetry.internal_errors_total = 0  # as the end of the bench wants it
