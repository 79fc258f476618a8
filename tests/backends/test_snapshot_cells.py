"""Cells as their manager sees them, and what it takes to make one; nothing here needs root."""

from __future__ import annotations

import errno
import ipaddress
import os
import random
import shutil
import stat
import threading
from pathlib import Path

import pytest

from backends.snapshots import cell, cells, probing
from backends.snapshots.base import Capability, SnapshotError, SnapshotKey
from backends.snapshots.criu import CriuSnapshots, why_not


def flag(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_every_number_has_a_pair_of_loopback_addresses_of_its_own() -> None:
    pairs = [cells.addresses(number) for number in range(cells.PAIRS)]
    flat = [address for pair in pairs for address in pair]
    assert len(set(flat)) == 2 * cells.PAIRS
    network = ipaddress.ip_network(cell.ADDRESSES)
    assert all(ipaddress.ip_address(address) in network for address in flat)
    assert all(ipaddress.ip_address(address).is_loopback for address in flat)


def test_launches_get_different_links_and_states(tmp_path: Path) -> None:
    made = cells.Cells(tmp_path / "cells", random.Random(1))
    made.open()
    starts = [made.run(f"launch{n}", ("engine", "--port", "1")) for n in range(200)]
    assert len({start.host for start in starts}) == 200
    assert len({flag(start.argv, "--link") for start in starts}) == 200
    assert starts[0].argv[-4:] == ("--", "engine", "--port", "1")
    assert all(len(flag(start.argv, "--link")) <= 15 for start in starts)  # IFNAMSIZ


def test_numbers_of_links_that_are_up_are_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {3, 77}
    monkeypatch.setattr(cells, "PAIRS", 80)
    monkeypatch.setattr(cells, "in_use", lambda: set(range(39)) - free)
    made = cells.Cells(tmp_path, random.Random(1))
    first = flag(made.run("a", ("x",)).argv, "--link")
    assert int(first.removeprefix(cells.LINK_PREFIX)) not in set(range(39)) - free
    monkeypatch.setattr(cells, "in_use", lambda: set(range(40)))
    with pytest.raises(SnapshotError, match="cells are up"):
        made.run("b", ("x",))


def test_a_state_is_what_the_cell_has_told_last(tmp_path: Path) -> None:
    made = cells.Cells(tmp_path, random.Random(1))
    assert made.state("one") == cells.CellState()
    state = cell.State(tmp_path / "one.json")
    state.tell(state="failed", reason="no such image")
    assert made.state("one").reason == "no such image"
    assert stat.S_IMODE((tmp_path / "one.json").stat().st_mode) == 0o600
    (tmp_path / "one.json").write_text("{torn")
    assert made.state("one") == cells.CellState()
    made.forget("one")
    assert list(tmp_path.iterdir()) == []


def test_states_that_dead_cells_left_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cells.Cells(tmp_path, random.Random(1))
    for name in ("gone", "alive", "young"):
        cell.State(tmp_path / f"{name}.json").tell(state="running")
    for name in ("gone", "alive"):
        os.utime(tmp_path / f"{name}.json", (1.0, 1.0))
    # All tell of this process, which keeps one of them.
    monkeypatch.setattr(cells, "_state_path", lambda _pid: tmp_path / "alive.json")
    made.open()
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["alive", "young"]


def test_a_process_that_is_no_cell_cannot_be_dumped() -> None:
    with pytest.raises(SnapshotError, match="is no cell") as caught:
        cells.inside(os.getpid())
    assert caught.value.running
    assert not cells.alive(2**22 + 1)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("echo Version: 4.1.1", "CRIU 4.1 is too old"),
        ("echo hello", "does not answer"),
        ("exit 1", "does not answer"),
    ],
)
def test_the_probe_says_what_is_wrong_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, reason: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/sbin/{name.rpartition('/')[2]}")
    fake = tmp_path / "criu"
    fake.write_text(f"#!/bin/sh\n{version}\n")
    fake.chmod(0o755)
    found = probing.find_criu({"DOHERTY_CRIU": str(fake)}, tmp_path)
    assert not found.capability.works
    assert reason in found.capability.reason


def test_the_probe_asks_for_root_and_for_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in probing.find_criu({}, tmp_path).capability.reason
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None if name == "nsenter" else f"/bin/{name}")
    assert "util-linux" in probing.find_criu({}, tmp_path).capability.reason
    monkeypatch.setattr("shutil.which", lambda name: None if name == "criu" else f"/bin/{name}")
    assert "deploy/criu.sh" in probing.find_criu({}, tmp_path).capability.reason
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    hidden = probing.find_criu({}, Path("/dev/shm/images"))
    assert "every cell has its own" in hidden.capability.reason


async def test_where_it_does_not_work_nothing_is_found_and_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    snapshots = CriuSnapshots(tmp_path, {})
    key = SnapshotKey(pool="a", model="m", engine="e", engine_version="1", launch_hash="x")
    assert snapshots.find(key) is None
    with pytest.raises(SnapshotError, match="need root") as caught:
        snapshots.enclose("launch", ("engine",))
    assert caught.value.running
    assert list(tmp_path.iterdir()) == []


async def test_what_is_left_of_a_failed_dump_is_removed_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be as large as the memory of a card, and requests are served meanwhile."""
    removers: list[threading.Thread] = []
    rmtree = shutil.rmtree

    def removed(folder: Path, *, ignore_errors: bool) -> None:
        removers.append(threading.current_thread())
        rmtree(folder, ignore_errors=ignore_errors)

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    works = probing.Found(Capability(works=True))
    monkeypatch.setattr("backends.snapshots.criu.find_criu", lambda *_: works)
    monkeypatch.setattr(cells, "inside", lambda _: None)
    monkeypatch.setattr("shutil.rmtree", removed)
    snapshots = CriuSnapshots(tmp_path / "s", {})
    monkeypatch.setattr(snapshots, "_dump", full)
    key = SnapshotKey(pool="a", model="m", engine="e", engine_version="1", launch_hash="x")
    with pytest.raises(SnapshotError, match="No space left") as caught:
        await snapshots.create(1, key, 8000, lambda *_: None)
    assert caught.value.running
    assert list((tmp_path / "s" / "images").iterdir()) == []
    assert removers
    assert threading.main_thread() not in removers


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Error (criu/image.c:1): write: No space left on device", "the disk is full"),
        ("Error (criu/files.c:3): Unknown shit 600 (anon_inode:[io_uring])", "io_uring"),
        ("Error (criu/files.c:3): Can't dump /dev/nvidia0", "suspend it first"),
        ("Error (criu/files.c:3): Something else", "could not dump it: Something else"),
    ],
)
def test_what_a_failed_dump_says_is_put_into_words(tmp_path: Path, line: str, words: str) -> None:
    log = tmp_path / "dump.log"
    log.write_text(f"Warn (criu/x.c:1): nothing\n{line}\n")
    assert words in why_not(log)
    assert "did not say why" in why_not(tmp_path / "missing")
