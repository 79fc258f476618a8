"""A new proxy takes the place of a running one, and no client notices."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
from collections import Counter
from pathlib import Path
from typing import Self

import pytest

from proxy import supervisor, takeover
from proxy.config import ProxyConfig
from proxy.flags import parse
from proxy.listeners import ADMIN, PUBLIC, Listeners, StartError, arrange, deal, open_listeners
from tests.fakes.engine import (
    Connection,
    Received,
    ScriptedEngine,
    answer_json,
    free_port,
    streaming,
)
from tests.fakes.plane import chat_request, until
from tests.fakes.proxy_process import ROOT, ProxyProcess, alive
from tests.fakes.talk import Talk, ask
from tests.io.test_reload import File, Secured
from tests.io.test_supervisor import EVENT, HeldStreams, opened

READYZ = b"GET /readyz HTTP/1.1\r\nhost: p\r\n\r\n"


class Load:
    """Clients that keep their connections, clients that do not, and streams; all count."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.port = port
        self.context = context
        self.served = Counter[str]()
        self.failures: list[str] = []
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        kinds = [self._keep] * 8 + [self._once] * 4 + [self._stream] * 4
        self._tasks = [asyncio.ensure_future(kind()) for kind in kinds]
        await self.more(50)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def more(self, count: int) -> None:
        """Wait until so many more requests have been served."""
        enough = self.served.total() + count
        await until(lambda: self.served.total() >= enough or self.failures)

    async def _keep(self) -> None:
        while not self._stop:
            async with Talk(self.port, self.context) as talk:
                while not self._stop:
                    closes = await self._ask(talk, "kept", chat_request())
                    if closes:
                        break
                    await asyncio.sleep(0.005)

    async def _once(self) -> None:
        while not self._stop:
            async with Talk(self.port, self.context) as talk:
                await self._ask(talk, "once", chat_request(fields=["connection: close"]))

    async def _stream(self) -> None:
        while not self._stop:
            async with Talk(self.port, self.context) as talk:
                await self._ask(talk, "stream", chat_request(fields=["x-wanted: stream"]))

    async def _ask(self, talk: Talk, kind: str, request: bytes) -> bool:
        """Return whether the connection ends with the answer."""
        try:
            await talk.send(request)
            got = await talk.answer()
        except (OSError, AssertionError) as error:
            self.failures.append(f"{kind}: {error!r}")
            return True
        if got.status != 200 or not got.complete:
            self.failures.append(f"{kind}: {got.status} {got.body!r}")
        self.served[kind] += 1
        return got.fields.get("connection") == "close"


async def quick_or_streamed(connection: Connection, request: Received) -> None:
    if request.fields.get("x-wanted") != "stream":
        await answer_json(connection, b'{"ok":true}')
        return

    async def rest(connection: Connection) -> None:
        for _ in range(20):
            await asyncio.sleep(0.01)
            await connection.send(b"9\r\ndata: 2\n\n\r\n")
        await connection.send(b"0\r\n\r\n")

    await streaming(EVENT, then=rest)(connection, request)


async def test_upgrades_and_reloads_under_load_fail_nothing(tmp_path: Path) -> None:
    """With fewer workers, more workers, and fewer again than there are sockets."""
    async with ScriptedEngine(quick_or_streamed) as engine:
        file = File(tmp_path, worker_urls=[engine.url], workers=3)
        async with ProxyProcess(*file.flags) as proxy, Load(proxy.port) as load:
            left = []
            for workers in (1, 4, 2):
                file.write(worker_urls=[engine.url], workers=workers)
                left.append(await proxy.upgrade())
                assert len(proxy.workers()) == workers
                await load.more(150)
                proxy.signal(signal.SIGHUP)
                await load.more(50)
                assert load.failures == []
            # All kept connections have been told to go; the old processes have nothing to do.
            await until(lambda: not any(map(alive, left)))
            assert await proxy.metric("doherty_workers") == 2
            assert load.failures == []
            assert min(load.served[kind] for kind in ("kept", "once", "stream")) > 0


async def test_an_upgrade_with_tls_on_both_sides(tmp_path: Path) -> None:
    site = Secured(tmp_path)
    site.engine.script = quick_or_streamed
    async with site.proxy() as proxy, Load(proxy.port, site.old.client_context()) as load:
        old = await proxy.upgrade()
        await load.more(100)
        await until(lambda: not alive(old))
    assert load.failures == []


async def test_what_runs_on_the_old_one_ends_there_and_idle_connections_lose_nothing() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url, "--workers", "2") as proxy,
        Talk(proxy.port) as idle,
    ):
        await idle.send(chat_request())
        assert (await idle.answer()).fields.get("connection") is None
        held = HeldStreams()
        engine.script = held.script
        async with opened(proxy.port, 4) as talks, Talk(proxy.port) as promised:
            await promised.send(chat_request())
            await promised.read_until(EVENT)
            workers = proxy.workers()
            old = await proxy.upgrade()
            assert (await ask(proxy.port, READYZ)).status == 200
            assert (await proxy.admin("/readyz")).status == 200
            assert alive(old)
            held.release.set()
            for talk in talks:
                await talk.read_to_end()
                assert talk.received.endswith(b"data: 2\n\n\r\n0\r\n\r\n")
            await promised.read_until(b"0\r\n\r\n")
            # Told before the upgrade that it may go on, and idle since: both are served once more.
            for talk in (promised, idle):
                await talk.send(chat_request())
                talk.received = b""
                await talk.read_to_end()
                assert talk.received.startswith(b"HTTP/1.1 200 OK\r\n")
                assert b"connection: close\r\n" in talk.received
                assert talk.received.endswith(b"0\r\n\r\n")
        await until(lambda: proxy.process.returncode == 0)
        assert not any(map(alive, workers))
        assert alive(proxy.pid)


async def test_a_health_check_kept_on_the_old_one_hears_that_the_port_is_ready() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url) as proxy,
        Talk(proxy.port) as balancer,
    ):
        await balancer.send(READYZ)
        assert (await balancer.answer()).status == 200
        await proxy.upgrade()
        told = None
        while told != "close":  # the order to leave may come after the next question
            await asyncio.sleep(0.02)
            await balancer.send(READYZ)
            answer = await balancer.answer()
            assert answer.status == 200
            told = answer.fields.get("connection")


async def test_a_term_shortens_the_leave_of_the_old_one() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url) as proxy,
        Talk(proxy.port) as idle,
    ):
        await idle.send(chat_request())
        assert (await idle.answer()).status == 200
        old = await proxy.upgrade()
        os.kill(old, signal.SIGTERM)
        await idle.read_to_end()
        assert idle.ended == "eof"
        await until(lambda: proxy.process.returncode == 0)
        assert (await ask(proxy.port, chat_request())).status == 200


async def test_a_new_one_that_cannot_start_changes_nothing(tmp_path: Path) -> None:
    async with ScriptedEngine(quick_or_streamed) as engine:
        file = File(tmp_path, worker_urls=[engine.url], access_log="off")
        async with ProxyProcess(*file.flags) as proxy, Load(proxy.port) as load:
            for settings in ({"policy": "best"}, {"tls_cert_path": "/none", "tls_key_path": "/n"}):
                said = len(proxy.lines)
                file.write(worker_urls=[engine.url], **settings)
                proxy.signal(signal.SIGUSR2)
                await proxy.until_said("the new proxy ended with 2", said)
            said = len(proxy.lines)
            file.write(worker_urls=[engine.url])
            proxy.signal(signal.SIGUSR2)
            while len(proxy.workers()) < 2:  # its worker and its successor
                await asyncio.sleep(0.001)
            os.kill(max(proxy.workers()), signal.SIGKILL)
            await proxy.until_said("the new proxy ended with -9", said)
            await load.more(50)
            assert load.failures == []
            await proxy.upgrade()
            await load.more(50)
            assert load.failures == []


async def test_another_proxy_in_the_working_folder_is_not_given_the_sockets(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess(
            *("--worker-urls", engine.url),
            environment={"PYTHONPATH": str(ROOT)},
            folder=tmp_path,
        ) as proxy,
    ):
        (tmp_path / "proxy").mkdir()
        (tmp_path / "proxy" / "__init__.py").touch()
        (tmp_path / "proxy" / "__main__.py").write_text("raise SystemExit(77)")
        await proxy.upgrade()
        assert (await ask(proxy.port, chat_request())).status == 200


def test_a_successor_finds_the_sources_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def path_of_successor() -> str | None:
        return takeover.successor_environment(9).get("PYTHONPATH")

    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", ["/elsewhere", str(ROOT)])  # installed
    assert path_of_successor() is None
    monkeypatch.setattr(sys, "path", [str(ROOT)])  # started there
    assert path_of_successor() == str(ROOT)
    monkeypatch.setenv("PYTHONPATH", "/libs")
    assert path_of_successor() == f"{ROOT}:/libs"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:/libs")  # a successor's own
    assert path_of_successor() == f"{ROOT}:/libs"


async def test_a_takeover_by_path(tmp_path: Path) -> None:
    path = str(tmp_path / "upgrade.sock")
    async with (
        ScriptedEngine(quick_or_streamed) as engine,
        ProxyProcess(
            *("--worker-urls", engine.url, "--workers", "2", "--upgrade-socket", path)
        ) as old,
        Load(old.port) as load,
    ):
        assert os.stat(path).st_mode & 0o777 == 0o600
        beside = await ProxyProcess("--worker-urls", engine.url, "--upgrade-socket", path).start()
        assert await beside.ended() == 1
        assert f"a proxy runs at {path}" in beside.lines[-1]
        await beside.__aexit__()
        flags = ("--worker-urls", engine.url, "--takeover", path, "--upgrade-socket", path)
        ports = ("--port", str(old.port), "--admin-port", str(old.admin_port))
        async with ProxyProcess(*flags, *ports) as first:
            assert (first.port, first.admin_port) == (old.port, old.admin_port)
            await load.more(50)
            assert await old.ended() == 0
            async with ProxyProcess(*flags, *ports, "--workers", "3") as second:
                await load.more(50)
                assert await first.ended() == 0
                assert os.path.exists(path)
                assert await second.metric("doherty_workers") == 3
                await load.__aexit__()
                assert load.failures == []
                second.signal(signal.SIGTERM)
                assert await second.ended() == 0
        assert not os.path.exists(path)
    nobody = await ProxyProcess("--worker-urls", engine.url, "--takeover", path).start()
    assert await nobody.ended() == 1
    assert f"no proxy to take over at {path}" in nobody.lines[-1]
    await nobody.__aexit__()


async def test_an_upgrade_may_move_to_another_port(tmp_path: Path) -> None:
    path, port = str(tmp_path / "upgrade.sock"), await free_port()
    async with ScriptedEngine() as engine:
        flags = ("--worker-urls", engine.url)
        async with ProxyProcess(*flags, "--upgrade-socket", path) as old:
            moved = ("--takeover", path, "--port", str(port))
            async with ProxyProcess(*flags, *moved) as new:
                assert new.port == port
                assert new.admin_port == old.admin_port
                assert (await ask(port, chat_request())).status == 200
                assert await old.ended() == 0
                with pytest.raises(ConnectionRefusedError):
                    await Talk(old.port).__aenter__()


async def test_sockets_of_systemd_are_used_where_they_are() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as public,
        socket.create_server(("127.0.0.1", 0)) as admin,
    ):
        environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:admin"}
        flags = ["--worker-urls", "http://127.0.0.1:9", "--workers", "3", "--port", "1"]
        command = [sys.executable, "-m", "proxy", *flags, "--access-log", "off"]
        # As systemd does: the sockets are moved to 3 and 4, and the process id stays.
        script = (
            "import os, sys; from fcntl import fcntl, F_DUPFD;"
            "one, two = (fcntl(int(fd), F_DUPFD, 20) for fd in sys.argv[1:3]);"
            "os.dup2(one, 3); os.dup2(two, 4); os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, str(public.fileno()), str(admin.fileno()), *command),
            cwd=ROOT,
            env={**os.environ, **environment},
            pass_fds=(public.fileno(), admin.fileno()),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            live = b"GET /livez HTTP/1.1\r\nhost: p\r\n\r\n"
            for listener in (public, admin):
                port = listener.getsockname()[1]
                listener.close()
                assert (await ask(port, live, "GET")).status == 200
        finally:
            process.terminate()
            assert await process.wait() == 0


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sockets", "workers"), [(1, 1), (4, 4), (4, 1), (4, 3), (1, 3), (2, 5)])
def test_every_socket_is_served_and_every_worker_has_one(sockets: int, workers: int) -> None:
    made = [socket.socket() for _ in range(sockets)]
    hands = deal(made, workers)
    assert len(hands) == workers
    assert all(hands)
    assert {listener.fileno() for hand in hands for listener in hand} == {s.fileno() for s in made}
    assert sum(map(len, hands)) == max(sockets, workers)
    for listener in made:
        listener.close()


async def test_many_sockets_go_over_in_order_and_only_to_those_who_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    public = open_listeners("127.0.0.1", 0, 150)
    with socket.create_server(("127.0.0.1", 0)) as admin:
        have = Listeners(public, [admin], frozenset((ADMIN,)))
        left = asyncio.Event()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        links: list[socket.socket | None] = []

        async def leave(link: socket.socket | None) -> None:
            links.append(link)
            left.set()

        handing = asyncio.ensure_future(takeover.hand_over(ours, have, leave))
        successor = takeover.Predecessor(theirs)
        got = await asyncio.to_thread(successor.receive)
        assert [s.getsockname() for s in got.public] == [s.getsockname() for s in public]
        assert [s.getsockname() for s in got.admin] == [admin.getsockname()]
        assert got.pinned == {ADMIN}
        assert not left.is_set()
        said, link = await successor.relieve()
        assert said
        assert left.is_set()
        assert await handing
        assert links[0] is not None
        with link, links[0] as other:
            link.send(b"hello")
            assert other.recv(9) == b"hello"
        monkeypatch.setattr(takeover, "_trusted", lambda _: False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert not await takeover.hand_over(ours, have, leave)
        with pytest.raises(StartError, match="does not hand over"):
            takeover.Predecessor(theirs).receive()
        have.close()
        got.close()


async def test_a_successor_that_knows_nothing_of_links_takes_over_as_well() -> None:
    have = Listeners(open_listeners("127.0.0.1", 0, 1), [])
    links: list[socket.socket | None] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def leave(link: socket.socket | None) -> None:
        links.append(link)

    handing = asyncio.ensure_future(takeover.hand_over(ours, have, leave))
    got = await asyncio.to_thread(takeover.Predecessor(theirs).receive)
    theirs.setblocking(True)
    theirs.send(takeover.READY)
    assert await handing
    assert theirs.recv(99) == takeover.LEFT
    assert links == [None]
    theirs.close()
    have.close()
    got.close()


async def test_one_that_comes_and_says_nothing_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(takeover, "READY_TIMEOUT_S", 0.05)
    have = Listeners(open_listeners("127.0.0.1", 0, 1), [])
    left = asyncio.Event()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def leave(_: socket.socket | None) -> None:
        left.set()

    with theirs:
        async with asyncio.timeout(20):  # only so that this ends if the claim is false
            assert not await takeover.hand_over(ours, have, leave)
    assert not left.is_set()
    assert "was not ready within 0.05 s" in caplog.text
    have.close()


async def test_a_successor_that_hangs_is_ended_and_the_next_one_may_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(takeover, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(takeover, "END_TIMEOUT_S", 0.1)
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 0.1; done\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    have = Listeners(open_listeners("127.0.0.1", 0, 1), [])
    flags = parse(["--worker-urls", "http://127.0.0.1:9", "--access-log", "off"], {})
    proxy = supervisor.Supervisor(flags, flags.settings(), have)
    async with asyncio.timeout(20):  # only so that this ends if the claim is false
        for _ in range(2):
            caplog.clear()
            proxy._upgrade()
            await until(lambda: "the new proxy ended with -9" in caplog.text)
            await until(lambda: not len(proxy._tasks))
    await proxy._tasks.close()
    have.close()


@pytest.mark.parametrize(("uid", "trusted"), [(0, True), (1234, True), (1235, False)])
def test_the_owner_and_root_are_trusted(
    monkeypatch: pytest.MonkeyPatch, uid: int, *, trusted: bool
) -> None:
    class End:
        def getsockopt(self, *_: int) -> bytes:
            return takeover._CREDENTIALS.pack(99, uid, 5)

    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert takeover._trusted(End()) is trusted


def test_found_sockets_that_are_configured_elsewhere_are_closed() -> None:
    found = Listeners(open_listeners("127.0.0.1", 0, 2), open_listeners("127.0.0.1", 0, 1))
    there = found.public[0].getsockname()[1]
    config = ProxyConfig(port=there, admin_host="127.0.0.2", admin_port=0, workers=3)
    got = arrange(config, found)
    assert [s.getsockname()[1] for s in got.public] == [there] * 3
    assert found.admin[0].fileno() == -1
    assert got.admin[0].getsockname()[0] == "127.0.0.2"
    got.close()
    given = Listeners(open_listeners("127.0.0.1", 0, 1), [], frozenset((PUBLIC,)))
    got = arrange(ProxyConfig(port=1, admin_port=0, workers=3), given)
    assert got.public == given.public
    got.close()
