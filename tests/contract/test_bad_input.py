"""What people get wrong, and what they are told: an exit status or an HTTP status, and words.

2 is for the command line and the configuration, 1 for a run that cannot be. Nothing is left running
by a refused start; the messages name the place and the remedy.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.contract.conftest import Site
from tests.fakes.programs import (
    CLI,
    ROOT,
    WAIT_S,
    environment,
    fetch,
    free_port,
    proxy_before,
    running,
)

MODEL = "models:\n  - name: demo\n    pools:\n      - {engine: simulator}\n"


class Refusal(msgspec.Struct, frozen=True):
    """A command line that is refused. PORT stands for one in use, FILE for the file with `text`."""

    name: str
    command: str
    status: int
    words: tuple[str, ...]
    text: str = ""


CONFIGURATIONS = (
    ("unknown section", "prox: {port: 1}\n", ("FILE:1", "unknown key 'prox'", "'proxy'")),
    ("unknown key", MODEL + "proxy:\n  prot: 1\n", ("FILE:6", "unknown key 'prot'", "'port'")),
    (
        "unknown key in a pool",
        MODEL.replace("{engine", "{replica: 2, engine"),
        ("FILE:4", "unknown key 'replica'", "'replicas'"),
    ),
    ("wrong type", "proxy: {port: many}\n", ("FILE:1", "proxy.port", "int")),
    ("out of range", "proxy: {workers: 0}\n", ("FILE:1", "proxy.workers", ">= 1")),
    ("unknown engine", MODEL.replace("simulator", "tgi"), ("FILE:4", "engine", "tgi")),
    ("no engine", MODEL.replace("engine: simulator", "replicas: 1"), ("FILE:4", "engine")),
    ("no pools", "models:\n  - name: demo\n    pools: []\n", ("FILE:3", "pools")),
    ("not YAML", "proxy: {port: 1\n", ("FILE:", "not valid YAML")),
    ("a key twice", "proxy: {port: 1, port: 2}\n", ("FILE:1", "'port' is given twice")),
    ("a model twice", MODEL + MODEL.partition("\n")[2], ("FILE", "'demo' is defined twice")),
)
# Every command that reads a configuration refuses it alike.
READERS = ("up FILE", "check FILE", "manager --config FILE", "proxy --config FILE")

REFUSALS = (
    *(
        Refusal(f"{command.split()[0]}: {name}", command, 2, words, text)
        for name, text, words in CONFIGURATIONS
        for command in (READERS if name == "unknown key" else READERS[1:2])
    ),
    Refusal("no such file", "up nowhere.yaml", 2, ("nowhere.yaml", "cannot be read")),
    Refusal("unknown command", "serve", 2, ("invalid choice: 'serve'",)),
    Refusal("no command", "", 2, ("usage: doherty",)),
    Refusal("unknown flag", "up --prot 1", 2, ("--prot",)),
    Refusal("proxy: port out of range", "proxy --port 70000", 2, ("--port", "65535")),
    Refusal("proxy: no number", "proxy --workers two", 2, ("--workers",)),
    Refusal("proxy: unknown policy", "proxy --policy best", 2, ("--policy", "best")),
    Refusal("manager: port out of range", "manager --port 70000", 2, ("'70000'", "65535")),
    Refusal("up with --worker-urls", "up --worker-urls http://h:1", 2, ("--worker-urls", "proxy")),
    Refusal("proxy: no replicas", "proxy", 1, ("replica list is empty", "--worker-urls")),
    Refusal("proxy: not a URL", "proxy --worker-urls gpu1:30000", 1, ("'gpu1:30000'", "http://")),
    Refusal(
        "proxy: a URL twice", "proxy --worker-urls http://h:1 http://h:1/", 1, ("given twice",)
    ),
    Refusal(
        "proxy: port in use",
        "proxy --worker-urls http://h:1 --admin-port 0 --port PORT",
        1,
        ("127.0.0.1:PORT is in use", "another with --port"),
    ),
    Refusal(
        "proxy: admin port in use",
        "proxy --worker-urls http://h:1 --port 0 --admin-port PORT",
        1,
        ("admin", "127.0.0.1:PORT is in use", "another with --admin-port"),
    ),
    Refusal(
        "manager: port in use",
        "manager --config FILE --run-dir RUN --port PORT",
        1,
        ("port PORT on 127.0.0.1", "in use", "--port"),
        MODEL,
    ),
    *(
        Refusal(
            f"up: {flag} in use",
            f"up FILE --run-dir RUN --port=0 --admin-port=0 --manager-port=0 {flag} PORT",
            1,
            ("port PORT on 127.0.0.1 is in use", f"another with {flag}"),
            MODEL,
        )
        for flag in ("--port", "--admin-port", "--manager-port")
    ),
    Refusal(
        "up: one port for two",
        "up FILE --run-dir RUN --port=FREE --admin-port=FREE --manager-port=0",
        1,
        ("two of --port, --admin-port, --manager-port, --offline-port are the same",),
        MODEL,
    ),
    Refusal(
        "run folder is a file",
        "manager --config FILE --run-dir FILE --port 0",
        1,
        ("run folder FILE cannot be used",),
        MODEL,
    ),
)


@pytest.fixture(scope="module")
def port_in_use() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_a_start_that_cannot_be(case: Refusal, tmp_path: Path, port_in_use: int) -> None:
    path = tmp_path / "doherty.yaml"
    path.write_text(case.text)
    names = {
        "FILE": str(path),
        "RUN": str(tmp_path / "run"),
        "PORT": str(port_in_use),
        "FREE": str(free_port()),
    }

    def filled(text: str) -> str:
        return re.sub("FILE|RUN|PORT|FREE", lambda match: names[match[0]], text)

    ended = subprocess.run(
        [*CLI, *filled(case.command).split()],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=tmp_path,
        env=environment(),
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == case.status, said
    for words in case.words:
        assert filled(words) in said
    assert "Traceback" not in said


def test_a_second_manager_on_a_run_folder(tmp_path: Path) -> None:
    config = tmp_path / "none.yaml"
    config.write_text("manager: {port: 0}\n")
    flags = ("manager", "--config", str(config), "--run-dir", str(tmp_path / "run"))
    with running((*CLI, *flags), tmp_path / "first.log") as first:
        first.until_said("manager_listening")
        second = subprocess.run(
            [*CLI, *flags],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            cwd=ROOT,
            env=environment(),
            check=False,
        )
        assert second.returncode == 1
        assert f"(pid {first.pid}) already runs on {tmp_path / 'run'}" in second.stderr
        assert "--run-dir" in second.stderr


# --- over HTTP ---------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True):
    """A request that is refused before it reaches an engine."""

    name: str
    status: int
    code: str
    words: str
    body: bytes | None = b'{"model": "demo-vllm", "messages": [{"role": "user", "content": "x"}]}'
    path: str = "/v1/chat/completions"
    headers: tuple[tuple[str, str], ...] = ()
    method: str | None = None


REQUESTS = (
    Request("torn JSON", 400, "invalid_json", "not valid JSON", b'{"model": "demo-vllm"'),
    Request("not UTF-8", 400, "invalid_json", "not valid JSON", b'{"model": "\xff\xfe"}'),
    Request("a text", 400, "invalid_request", "JSON object", b'"hello"'),
    Request("NaN", 400, "invalid_json", "not valid JSON", b'{"model": NaN}'),
    Request("no body", 400, "invalid_json", "not valid JSON", b""),
    Request("no model", 400, "missing_model", 'add "model"', b'{"messages": []}'),
    Request("empty model", 400, "missing_model", "non-empty", b'{"model": ""}'),
    Request("long model", 400, "invalid_request", "too long", b'{"model": "%b"}' % (b"m" * 300)),
    Request("unknown model", 404, "model_not_found", "served: demo-", b'{"model": "x"}'),
    Request("unknown path", 404, "unknown_path", "/v1/complete", path="/v1/complete"),
    Request("engine control", 404, "unknown_path", "/sleep", path="/sleep?level=2"),
    Request("dot segments", 404, "unknown_path", "..", path="/v1/../sleep"),
    Request("encoded path", 404, "unknown_path", "%2f", path="/v1%2fchat/completions"),
    Request("wrong method", 405, "method_not_allowed", "use GET, POST", method="PUT"),
    Request(
        "compressed", 415, "unsupported_content_encoding", "compressed",
        headers=(("content-encoding", "gzip"),),
    ),
    Request(
        "announced too large", 413, "request_too_large", "--max-payload-size", b"{}",
        headers=(("content-length", str(1 << 40)),),
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case.name)
def test_a_request_that_cannot_be(site: Site, case: Request) -> None:
    answer = fetch(site.proxy.url + case.path, case.body, dict(case.headers), method=case.method)
    assert answer.status == case.status
    assert answer.headers["content-type"] == "application/json"
    error = answer.value["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == case.code
    assert error["type"] == "invalid_request_error"
    assert case.words in error["message"]


def test_a_manager_without_replicas(tmp_path: Path) -> None:
    """The endpoint is up, and says why it cannot answer."""
    config = tmp_path / "none.yaml"
    config.write_text(MODEL.replace("{engine", "{replicas: 0, engine"))
    flags = ("--config", str(config), "--run-dir", str(tmp_path / "run"), "--port", "0")
    with running((*CLI, "manager", *flags), tmp_path / "manager.log") as manager:
        port = json.loads(manager.until_said(r'\{.*"manager_listening".*\}')[0])["port"]
        with proxy_before(
            tmp_path / "proxy.log", "--manager-url", f"http://127.0.0.1:{port}"
        ) as proxy:
            body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "x"}]})
            answer = fetch(proxy.url + "/v1/chat/completions", body.encode())
            assert answer.status == 503
            assert answer.value["error"]["code"] == "no_replica"
            assert "the replica list is empty" in answer.value["error"]["message"]
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-should-retry"] == "true"
            assert fetch(proxy.url + "/readyz").status == 503
            assert fetch(proxy.url + "/livez").status == 200
            assert fetch(proxy.url + "/v1/models").value["data"] == []
