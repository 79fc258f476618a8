"""Snapshots by CRIU itself: real cells, real images of simulated engines, and what can go wrong."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from backends.providers.process import read_stat
from backends.snapshots.base import SnapshotError
from backends.snapshots.cells import in_use
from tests.fakes.programs import children, until
from tests.fakes.snapshot_stage import KEY, PORT, SIMULATOR, Celled, Stage, stage

pytestmark = pytest.mark.snapshots

KV_EVENTS = '{"endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558","topic":"kv"}'


def _engine(cell: Celled) -> int:
    (init,) = children(cell.pid)
    (engine,) = children(init)
    return engine


def _engine_if_any(cell: Celled) -> int:
    for init in children(cell.pid):
        if here := children(init):
            return here[0] if Path(f"/proc/{here[0]}/comm").read_text() == "sleep\n" else 0
    return 0


def _state(pid: int) -> str:
    stat = read_stat(pid)
    assert stat is not None
    return stat.state


def _subscriber(host: str) -> zmq.Socket[bytes]:
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    made.setsockopt(zmq.LINGER, 0)
    made.subscribe(b"")
    made.connect(f"tcp://{host}:5557")
    return made


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as made:
        yield made


async def test_two_copies_at_once_answer_as_the_original_does(here: Stage) -> None:
    original = here.start()
    original.get("/health")
    words = original.ask("a long way to go")

    snapshot = await here.create(original)

    assert original.ask("a long way to go") == words  # it runs on
    assert here.snapshots.find(KEY) == snapshot
    copies = [here.restore(snapshot) for _ in range(2)]
    for copy in copies:
        await here.snapshots.restored(copy.pid, copy.launch_id)
    assert [copy.ask("a long way to go") for copy in copies] == [words, words]
    assert len({original.url, *(copy.url for copy in copies)}) == 3
    assert len({copy.answer("an id")["id"] for copy in copies}) == 2  # nothing random is kept
    # What they write goes to logs of their own, and the end of one is the end of one.
    copies[0].process.send_signal(signal.SIGTERM)
    assert copies[0].process.wait(20) == 0
    assert copies[1].ask("still here?") == original.ask("still here?")


async def test_one_that_stands_still_comes_back_standing_still(here: Stage) -> None:
    original = here.start()
    original.get("/health")
    engine = _engine(original)
    os.kill(engine, signal.SIGSTOP)

    snapshot = await here.create(original)

    assert _state(engine) == "T"  # as it was, not set going by the dump
    copy = here.restore(snapshot)
    await here.snapshots.restored(copy.pid, copy.launch_id)
    assert _state(_engine(copy)) == "T"
    for one in (original, copy):
        os.kill(_engine(one), signal.SIGCONT)
    assert copy.ask("awake") == original.ask("awake")


async def test_a_copy_of_a_copy_and_open_connections(here: Stage) -> None:
    original = here.start((*SIMULATOR, "--kv-events-config", KV_EVENTS))
    original.get("/health")
    words = original.ask("the same")
    with socket.create_connection((original.host, PORT)), _subscriber(original.host):
        first = await here.create(original)
    copy = here.restore(first)
    await here.snapshots.restored(copy.pid, copy.launch_id)
    assert copy.ask("the same") == words

    second = await here.create(copy)
    again = here.restore(second)
    await here.snapshots.restored(again.pid, again.launch_id)

    assert again.ask("the same") == words
    with _subscriber(again.host) as events:
        prompts = (f"{number} new words " * 40 for number in itertools.count())
        until(lambda: again.ask(next(prompts)) and events.poll(100), "an event of the copy")
    assert original.ask("the same") == words


async def test_clocks_go_on_where_they_stood(here: Stage) -> None:
    ticker = (
        "import time,http.server\n"
        "began=time.monotonic()\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "  def do_GET(self):\n"
        "    self.send_response(200); self.end_headers()\n"
        "    self.wfile.write(str(time.monotonic()-began).encode())\n"
        f"http.server.HTTPServer(('0.0.0.0',{PORT}),H).serve_forever()\n"
    )
    original = here.start((sys.executable, "-c", ticker))
    original.get("/")
    snapshot = await here.create(original)
    await asyncio.sleep(0.5)
    copy = here.restore(snapshot)
    await here.snapshots.restored(copy.pid, copy.launch_id)
    assert float(copy.get("/").text) < float(original.get("/").text) - 0.5


async def test_shared_memory_and_own_connections_belong_to_each_copy(here: Stage) -> None:
    writer = (
        "import http.server,mmap,os,tempfile\n"
        "path='/dev/shm/block'; open(path,'wb').write(bytes(4096))\n"
        "block=mmap.mmap(os.open(path,os.O_RDWR),4096)\n"
        "import socket; listener=socket.create_server(('127.0.0.1',7777))\n"
        "near=socket.create_connection(('127.0.0.1',7777)); far,_=listener.accept()\n"
        "beside=tempfile.NamedTemporaryFile(); beside.write(b'kept'); beside.flush()\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "  def do_GET(self):\n"
        "    block[0]+=1; self.send_response(200); self.end_headers()\n"
        "    near.sendall(open(beside.name,'rb').read()); kept=far.recv(99)\n"
        "    self.wfile.write(b'%d %b' % (open(path,'rb').read()[0], kept))\n"
        f"http.server.HTTPServer(('0.0.0.0',{PORT}),H).serve_forever()\n"
    )
    original = here.start((sys.executable, "-c", writer))
    assert original.get("/").text == "1 kept"
    snapshot = await here.create(original)
    copies = [here.restore(snapshot) for _ in range(2)]
    for copy in copies:
        await here.snapshots.restored(copy.pid, copy.launch_id)
    seen = [one.get("/").text for one in (copies[0], copies[0], copies[1], original)]
    assert seen == ["2 kept", "3 kept", "2 kept", "2 kept"]


async def test_an_engine_with_strays_is_not_dumped(here: Stage) -> None:
    cell = here.start(("sh", "-c", "(sleep 1000 &); exec sleep 1000"))
    until(lambda: [len(children(init)) for init in children(cell.pid)] == [2], "the stray")
    with pytest.raises(SnapshotError, match="on their own") as caught:
        await here.create(cell)
    assert caught.value.running


async def test_a_damaged_image_is_found_before_it_is_used(here: Stage) -> None:
    original = here.start()
    original.get("/health")
    snapshot = await here.create(original)
    pages = snapshot.folder / "pages-1.img"
    with pages.open("r+b") as file:  # one bit in the middle of 30 MB
        file.seek(pages.stat().st_size // 2)
        octet = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([octet ^ 1]))

    copy = here.restore(snapshot)
    with pytest.raises(SnapshotError, match=r"damaged: pages-1\.img is not what was written"):
        await here.snapshots.restored(copy.pid, copy.launch_id)

    assert copy.process.wait(20) == 70
    assert here.snapshots.find(KEY) is None
    assert here.told[-1][0] == "snapshot_damaged"


async def test_the_end_of_the_keeper_is_the_end_of_all(here: Stage) -> None:
    cell = here.start(("sleep", "1000"))
    engine = until(lambda: _engine_if_any(cell), "the engine")
    assert cell.number in in_use()

    cell.process.kill()

    until(lambda: not Path(f"/proc/{engine}").exists(), "the end of the engine")
    until(lambda: cell.number not in in_use(), "the end of the link")


async def test_a_cell_ends_as_its_engine_ends(here: Stage) -> None:
    statuses = [
        here.start(("sh", "-c", words)).process.wait(20) for words in ("exit 7", "kill -9 $$")
    ]
    assert statuses == [7, -9]
    assert here.start(("no-such-engine",)).process.wait(20) == 127


async def test_an_engine_in_a_cell_finds_no_io_uring_and_no_launch_id(here: Stage) -> None:
    cell = here.start(("sh", "-c", "env; grep Seccomp: /proc/self/status; ls /proc/self/fd; id"))
    assert cell.process.wait(20) == 0
    said = cell.log_path.read_text()
    assert "TMPDIR=/dev/shm/tmp" in said
    assert "DOHERTY_LAUNCH_ID" not in said
    assert "Seccomp:\t2" in said


async def test_a_dump_that_finds_the_disk_full_leaves_the_engine_serving(
    here: Stage, tmp_path: Path
) -> None:
    small = tmp_path / "snapshots"
    small.mkdir(0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "small", small], check=True)
    try:
        original = here.start()
        original.get("/health")
        with pytest.raises(SnapshotError) as caught:
            await here.create(original)
        assert caught.value.running
        assert original.ask("and now?")
        assert list((small / "images").iterdir()) == []
    finally:
        here.close()
        subprocess.run(["umount", small], check=True)
