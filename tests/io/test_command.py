"""What the command says, and its exit status, when it cannot start."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import pytest

from tests.fakes.engine import free_port
from tests.fakes.proxy_process import ProxyProcess

URL = ("--worker-urls", "http://127.0.0.1:9")
CASES = {
    "bad value": (("--workers", "none", *URL), {}, 2, r"--workers: "),
    "out of range": (("--workers", "0", *URL), {}, 2, r"--workers: .*>= 1"),
    "unknown flag": (("--wrokers", "2", *URL), {}, 2, r"--wrokers"),
    "bad environment": (URL, {"DOHERTY_MAX_PAYLOAD_SIZE": "big"}, 2, r"DOHERTY_MAX_PAYLOAD_SIZE: "),
    "no file": (("--config", "/no/such/file"), {}, 2, r"/no/such/file: cannot be read"),
    "no replicas": ((), {}, 1, r"replica list is empty: pass --worker-urls"),
    "bad URL": (("--worker-urls", "localhost:1"), {}, 1, r"'localhost:1' must look like http://"),
    "URL with a path": (("--worker-urls", "http://h:1/v1"), {}, 1, r"without path"),
    "bad port in a URL": (("--worker-urls", "http://h:99999"), {}, 1, r"port 99999 is not"),
    "URL twice": (("--worker-urls", "http://h:1", "http://h:1/"), {}, 1, r"is given twice"),
    "bad peer": (("--peers", "far", *URL), {}, 1, r"'far' must look like HOST:PORT or unix:PATH"),
    "host that is none": (("--host", "no.such.host.invalid", *URL), {}, 1, r"cannot listen on no"),
}


@pytest.mark.parametrize("name", list(CASES))
async def test_what_cannot_start_says_why(name: str) -> None:
    flags, environment, status, message = CASES[name]
    proxy = await ProxyProcess(*flags, environment=environment).start()
    assert await proxy.ended() == status
    assert re.search(message, "\n".join(proxy.lines)), proxy.lines
    assert not any("Traceback" in line for line in proxy.lines)
    await proxy.__aexit__()


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
@pytest.mark.parametrize("sharing", [False, True])
async def test_a_port_in_use_is_named(flag: str, *, sharing: bool) -> None:
    """Also one whose owner would share it: half of the requests would be somebody else's."""
    with socket.socket() as taken:
        if sharing:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        proxy = await ProxyProcess(*URL, flag, str(port)).start()
        assert await proxy.ended() == 1
        text = "\n".join(proxy.lines)
        assert f"127.0.0.1:{port} is in use" in text
        assert "Traceback" not in text
        await proxy.__aexit__()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("proxy:\n  workers: 2\n  wrokers: 3\n", r"conf\.yaml:3: .*'wrokers'.*'workers'"),
        ("proxy:\n  workers: many\n", r"conf\.yaml:2: "),
        ("proxy: [", r"conf\.yaml:\d: not valid YAML"),
    ],
)
async def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "conf.yaml"
    path.write_text(text)
    proxy = await ProxyProcess("--config", str(path)).start()
    assert await proxy.ended() == 2
    assert re.search(message, "\n".join(proxy.lines)), proxy.lines
    await proxy.__aexit__()


async def test_the_port_may_be_taken_again_at_once() -> None:
    """Connections that linger in the kernel after a stop do not hold the port."""
    port = await free_port()
    for _ in range(2):
        async with ProxyProcess(*URL, "--port", str(port)) as proxy:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            proxy.process.terminate()
            assert await proxy.ended() == 0
            writer.close()
