"""The two C programs: what the engine answers, and that the load generator sees what is wrong."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.bench import bodies, native, processes
from loadtest.run import RunError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler `cc`")

JSON = b'{"choices":[{"finish_reason":"stop"}],"system_fingerprint":"engine-01"}'
EVENTS = b"".join(b"data: %d\n\n" % number for number in range(3)) + b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def engine(programs: Path) -> Iterator[native.Engine]:
    with native.engine(native.build("engine", programs), 2, processes.cores_here()) as one:
        yield one


def ask(port: int, data: bytes, *, cut_at: int = 0) -> bytes:
    """Return all that comes back for `data`, sent in two pieces and with its end closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if cut_at:
            client.sendall(data[:cut_at])
            settle(port)
        client.sendall(data[cut_at:])
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return answer.read()


def settle(port: int) -> None:
    """Let the engine take what was sent before: it answers in the order of what is ready."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def post(content: bytes, *, chunks: int = 0) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
    if not chunks:
        return head + b"content-length: %d\r\n\r\n%s" % (len(content), content)
    parts = [content[at : at + chunks] for at in range(0, len(content), chunks)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + b"transfer-encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def test_a_plain_answer_names_its_replica(engine: native.Engine) -> None:
    for number, port in enumerate(engine.ports):
        before = engine.counts().requests
        value = json.loads(ask(port, post(b'{"stream":false}')))
        after = engine.counts().requests
        assert value["system_fingerprint"] == f"engine-{number:02}"
        assert value["usage"]["total_tokens"] == 419
        taken = [now - then for now, then in zip(after, before, strict=True)]
        assert taken == [int(place == number) for place in range(2)]


@pytest.mark.parametrize("chunks", [0, 1, 7, 1000])
def test_a_stream_is_asked_for_in_any_framing(engine: native.Engine, chunks: int) -> None:
    engine.streams(events=3, pace_ms=0)
    answer = ask(engine.ports[0], post(b'{"messages":[],"stream":true}', chunks=chunks))
    assert answer.count(b"\n\n") == 4
    assert answer.endswith(b"data: [DONE]\n\n")


def test_a_request_may_come_in_two_pieces_cut_anywhere(engine: native.Engine) -> None:
    engine.streams(events=1, pace_ms=0)
    data = post(b'{"stream":true}')
    for cut_at in range(1, len(data)):
        assert ask(engine.ports[0], data, cut_at=cut_at).count(b"\n\n") == 2


def test_a_prompt_that_speaks_of_streams_asks_for_none(engine: native.Engine) -> None:
    content = json.dumps({"messages": [{"content": '{"stream":true}'}], "stream": False})
    assert b"chat.completion" in ask(engine.ports[0], post(content.encode()))


def test_a_paced_stream_is_whole(engine: native.Engine) -> None:
    engine.streams(events=3, pace_ms=1)
    answer = ask(engine.ports[0], post(b'{"stream":true}'))
    assert answer.count(b"\n\n") == 4


def test_two_requests_in_one_write_are_answered_in_order(engine: native.Engine) -> None:
    engine.streams(events=2, pace_ms=1)
    twice = post(b'{"stream":true}') + post(b"{}")
    with socket.create_connection(("127.0.0.1", engine.ports[0]), timeout=10) as client:
        client.sendall(twice)
        seen = b""
        while b"engine-00" not in seen:
            seen += client.recv(65536)
    assert seen.index(b"[DONE]") < seen.index(b"engine-00")


# --- the load generator -------------------------------------------------------------------------


def requests_file(folder: Path, *, stream: bool = False, count: int = 4) -> Path:
    path = folder / "some.requests"
    some = [bodies.request(bodies.body(n, 300, stream=stream), n) for n in range(count)]
    path.write_bytes(bodies.packed(some))
    return path


def load(programs: Path, port: int, path: Path, **options: object) -> native.Report:
    every = {"port": port, "bodies": path, "connections": 2, "requests": 8, **options}
    program = native.build("load", programs)
    with native.load(program, processes.cores_here(), "test", every) as under_way:
        return under_way.report()


def test_right_answers_are_counted(engine: native.Engine, programs: Path, tmp_path: Path) -> None:
    report = load(programs, engine.ports[1], requests_file(tmp_path), placement=1)
    assert (report.requests, report.errors, report.open) == (8, {}, 2)
    assert report.placement == [1, 1, 1, 1]
    assert 0 < report.first_us.p50 <= report.latency_us.max


def test_streams_are_counted_event_by_event(
    engine: native.Engine, programs: Path, tmp_path: Path
) -> None:
    engine.streams(events=5, pace_ms=0)
    report = load(programs, engine.ports[0], requests_file(tmp_path, stream=True), events=5)
    assert (report.events, report.errors) == (8 * 6, {})
    report = load(programs, engine.ports[0], requests_file(tmp_path, stream=True), events=6)
    assert report.errors == {"wrong number of events": 8}


def test_an_open_loop_keeps_its_pace_and_an_upload_runs_beside_it(
    engine: native.Engine, programs: Path, tmp_path: Path
) -> None:
    upload = tmp_path / "upload.requests"
    upload.write_bytes(bodies.packed([bodies.request(b"x" * 300_000, 0)]))
    path = requests_file(tmp_path)
    before = engine.counts().body_octets
    report = load(programs, engine.ports[0], path, rate=200, seconds=0.2, requests=0, upload=upload)
    assert (report.requests, report.errors) == (40, {})
    assert report.uploads >= 1
    assert engine.counts().body_octets - before >= report.uploads * 300_000


def test_connections_are_held_until_they_are_let_go(
    engine: native.Engine, programs: Path, tmp_path: Path
) -> None:
    every = {"port": engine.ports[0], "bodies": requests_file(tmp_path), "connections": 20}
    every |= {"requests": 20, "concurrency": 3, "hold": 1}
    program = native.build("load", programs)
    with native.load(program, processes.cores_here(), "test", every) as under_way:
        assert under_way.until_ready() == 0
        report = under_way.report()
    assert (report.requests, report.open, report.errors) == (20, 20, {})


def test_streams_under_way_are_told(engine: native.Engine, programs: Path, tmp_path: Path) -> None:
    engine.streams(events=2, pace_ms=300)
    path = requests_file(tmp_path, stream=True)
    every = {"port": engine.ports[0], "bodies": path, "connections": 5, "requests": 5, "events": 2}
    program = native.build("load", programs)
    with native.load(program, processes.cores_here(), "test", every) as under_way:
        assert under_way.until_ready() == 5
        assert under_way.report().errors == {}


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[int]:
    """A server that answers every request of one connection after another so, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(65536)
                    client.sendall(answer)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def framed(content: bytes, *, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    return b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        size,
        content,
    )


CHUNKED = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "events", "error"),
    [
        (framed(JSON), 0, None),
        (framed(EVENTS), 3, None),
        (framed(JSON, status=b"502 Bad Gateway"), 0, "status 502"),
        (framed(JSON, length=len(JSON) + 1), 0, "truncated"),
        (framed(JSON, length=len(JSON) - 9), 0, "not the engine's answer"),
        (framed(b"{}"), 0, "not the engine's answer"),
        (framed(EVENTS.replace(b"data: 1\n\n", b"")), 3, "wrong number of events"),
        (framed(EVENTS + b"data: 4\n\n"), 3, "wrong number of events"),
        (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVENTS), EVENTS), 3, None),
        (CHUNKED + b"%x\r\n%s\r\n" % (len(EVENTS), EVENTS), 3, "truncated"),
        (CHUNKED + b"zz\r\n", 3, "malformed chunk"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + JSON, 0, "answer without framing"),
        (b"", 0, "closed without answer"),
    ],
)
def test_a_wrong_answer_is_an_error(
    programs: Path, tmp_path: Path, answer: bytes, events: int, error: str | None
) -> None:
    path = requests_file(tmp_path, stream=events > 0)
    with server(answer) as port:
        report = load(programs, port, path, connections=1, requests=2, events=events)
    assert report.errors == ({error: 2} if error else {})
    assert report.requests == 2


def test_nobody_there_is_an_error_and_not_forever(programs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    report = load(programs, port, requests_file(tmp_path), requests=1_000_000)
    assert report.errors == {"refused": 100}


def test_each_request_has_a_number_of_its_own(programs: Path, tmp_path: Path) -> None:
    seen: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            for _ in range(3):
                seen.append(client.recv(65536))
                client.sendall(framed(JSON).replace(b"connection: close\r\n", b""))
            client.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with listener:
        path = requests_file(tmp_path, count=1)
        load(programs, listener.getsockname()[1], path, connections=1, requests=3, tag=254)
        thread.join()
    for number, one in zip(("000000fe", "000000ff", "00000100"), seen, strict=True):
        assert number.encode() in one
        assert bodies.TAG.encode() not in one


def test_without_a_compiler_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no C compiler `cc`"):
        native.build("engine", tmp_path)


def test_a_source_that_does_not_compile_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.c").write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    with pytest.raises(RunError, match=r"odd\.c cannot be compiled: [\s\S]*nothing"):
        native.build("odd", tmp_path)


def test_a_program_is_compiled_once(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.build("load", programs)
    monkeypatch.setenv("PATH", "")
    assert native.build("load", programs) == first
