"""Snapshots by CRIU itself: real cells, real images of simulated engines, and what can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.snapshots.base import SnapshotError
from backends.snapshots.cells import in_use
from tests.fakes.programs import children, until
from tests.fakes.snapshot_stage import KEY, Stage, stage

pytestmark = pytest.mark.snapshots


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
    # What they write goes to logs of their own, and the end of one is the end of one.
    copies[0].process.send_signal(signal.SIGTERM)
    assert copies[0].process.wait(20) == 0
    assert copies[1].ask("still here?") == original.ask("still here?")


async def test_request_ids_of_two_copies_differ(here: Stage) -> None:
    original = here.start()
    original.get("/health")
    snapshot = await here.create(original)
    ids = set()
    for _ in range(2):
        copy = here.restore(snapshot)
        await here.snapshots.restored(copy.pid, copy.launch_id)
        ids |= {copy.answer("same prompt")["id"] for _ in range(2)}
    assert len(ids) == 4


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
    before = in_use()
    cell = here.start()
    cell.get("/health")
    assert len(in_use() - before) == 1
    (init,) = children(cell.pid)

    cell.process.kill()

    until(lambda: not Path(f"/proc/{init}").exists(), "the end of the init")
    until(lambda: in_use() <= before, "the end of the link")


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
