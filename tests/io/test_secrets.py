"""Keys, prompts and completions are nobody's business but the client's and the engine's."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json, streaming
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk, ask

KEY = "canary-key-71c1"
ADMIN_KEY = "canary-admin-5f02"
PROMPT = "canary-prompt-9e34"
COMPLETION = "canary-completion-b5a8"
SECRETS = (KEY, ADMIN_KEY, PROMPT, COMPLETION)

GOOD = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "user": PROMPT}
).encode()
# Bodies that are refused, each with the prompt in the place that the refusal is about.
REFUSED = [
    GOOD[:-1],
    GOOD[:-1] + b',"x":}',
    GOOD.replace(b'"m"', b"7"),
    GOOD[:-1] + b',"stream":"' + PROMPT.encode() + b'"}',
    GOOD[:-1] + b',"cache_salt":["' + PROMPT.encode() + b'"]}',
    GOOD[:-1] + b',"x":"\xff' + PROMPT.encode() + b'"}',
    b'["' + PROMPT.encode() + b'"]',
    b'"' + PROMPT.encode() + b'"',
    PROMPT.encode(),
]
KEYED = f"authorization: Bearer {KEY}"


async def cut(connection: Connection) -> None:
    connection.reset()


async def in_garbage(connection: Connection, _: Received) -> None:
    await connection.send(COMPLETION.encode() + b"\r\n\r\n")


async def in_a_bad_head(connection: Connection, _: Received) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\nx " + COMPLETION.encode() + b": 1\r\n\r\n")


async def in_bad_chunks(connection: Connection, _: Received) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    await connection.send(head + COMPLETION.encode() + b"\r\n")


async def whole(connection: Connection, _: Received) -> None:
    await answer_json(connection, b'{"content":"%b","usage":null}' % COMPLETION.encode())


SCRIPTS = [
    whole,
    in_garbage,
    in_a_bad_head,
    in_bad_chunks,
    streaming(b"data: " + COMPLETION.encode() + b"\n\n"),
    streaming(b"data: " + COMPLETION.encode() + b"\n\n", then=cut),
]


def heads(key: str) -> list[bytes]:
    """Return requests that are refused by their heads, with a key in many places."""
    line = "POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\n"
    return [
        f"{line}authorization: Bearer {key}\r\nauthorization: Bearer {key}\r\n\r\n".encode(),
        f"{line}authorization: Basic {key}\r\ncontent-length: 0\r\n\r\n".encode(),
        f"{line}x-api-key: wrong{key}\r\ncontent-length: 0\r\n\r\n".encode(),
        f"{line}bad field {key}\r\n\r\n".encode(),
        f"{line}content-length: {key}\r\n\r\n".encode(),
        f"GET /v1/models?api_key={key} HTTP/1.1\r\nhost: p\r\n\r\n".encode(),
        f"GET /nope?api_key={key} HTTP/1.1\r\nhost: p\r\n{KEYED}\r\n\r\n".encode(),
    ]


async def test_no_secret_is_in_a_log_a_metric_or_an_error(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    flags = ("--api-key", KEY, "--admin-api-key", ADMIN_KEY, "--log-level", "debug")
    told: list[bytes] = []
    async with (
        ScriptedEngine() as engine,
        ProxyProcess(
            "--worker-urls", engine.url, "--access-log", str(log), "--expose-routing", *flags
        ) as proxy,
    ):
        for script in SCRIPTS:
            engine.script = script
            # The failure before made the replica a suspect; it is back when its probe is answered.
            while (got := await ask(proxy.port, chat_request(GOOD, [KEYED]))).status == 503:
                await asyncio.sleep(0.005)
            if got.status != 200:
                told.append(got.body)
        for body in REFUSED:
            got = await ask(proxy.port, chat_request(body, [KEYED]))
            assert got.status == 400
            told.append(got.body)
        for request in heads(KEY):
            async with Talk(proxy.port) as talk:
                await talk.send(request)
                got = await talk.answer("GET" if request.startswith(b"GET") else "POST")
                assert 400 <= got.status < 500
                told.append(got.body)
        await engine.stop()
        for _ in range(2):
            got = await ask(proxy.port, chat_request(GOOD, [KEYED]))
            assert got.status in (502, 503)
            told.append(got.body)
        assert (await proxy.admin("/metrics")).status == 401
        told += [(await proxy.admin(page, ADMIN_KEY)).body for page in ("/metrics", "/replicas")]
        told.append((await proxy.admin("/metrics", KEY)).body)
        proxy.process.terminate()
        assert await proxy.ended() == 0
        told += [line.encode() for line in proxy.lines] + [proxy.output]
    access = log.read_bytes()
    lines = [json.loads(line) for line in access.splitlines()]
    assert {line["status"] for line in lines} >= {200, 400, 401, 404, 502}
    assert {line["outcome"] for line in lines} >= {"ok", "stream_cut", "bad_replica_answer"}
    everything = b"\n".join([*told, access])
    assert b"doherty_requests_total" in everything
    for secret in SECRETS:
        assert secret.encode() not in everything


async def test_no_process_of_a_proxy_leaves_an_image_of_its_memory() -> None:
    async with ProxyProcess("--worker-urls", "http://127.0.0.1:1", "--workers", "2") as proxy:
        for pid in (proxy.pid, *proxy.workers()):
            (limit,) = re.findall(
                r"Max core file size +(\d+) +(\S+)", Path(f"/proc/{pid}/limits").read_text()
            )
            assert limit[0] == "0"
