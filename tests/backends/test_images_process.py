"""Replicas from images, for real: managers, simulators in cells, CRIU; kills and damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.contract import ReplicaRecord
from tests.fakes.mortal_region import PATIENCE_S, MortalRegion
from tests.fakes.region import alive
from tests.fakes.snapshot_stage import need_criu

pytestmark = [pytest.mark.snapshots, pytest.mark.faults]

POOL = {"name": "p", "snapshot": True}


@pytest.fixture
def region(tmp_path: Path) -> Iterator[MortalRegion]:
    need_criu()
    region = MortalRegion(tmp_path, [POOL], gpus="none")
    try:
        region.start()
        yield region
    finally:
        region.clean()


def said(record: ReplicaRecord) -> str:
    """Return what the engine itself says to a prompt."""
    body = json.dumps({"model": "m", "prompt": "one two", "max_tokens": 8, "temperature": 0})
    request = urllib.request.Request(
        record.url + "/v1/completions", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as page:
        return str(json.loads(page.read())["choices"][0]["text"])


def again(region: MortalRegion, before: ReplicaRecord, name: str = "p-0") -> ReplicaRecord:
    """Wait until another process serves in the place of `before`."""

    def look() -> ReplicaRecord | None:
        record = region.fleet().get(name)
        there = record and record.state.value == "ready" and record.pid != before.pid
        return record if there else None

    return region.until(look, "another process")


def test_dumped_once_and_restored_after_each_death(region: MortalRegion) -> None:
    first = region.is_("p-0", "ready")
    words = said(first)
    (image,) = (region.folder / "run" / "snapshots" / "images").iterdir()
    os.kill(first.pid, signal.SIGKILL)
    second = again(region, first)
    assert second.reason.startswith("restored, after ")
    assert said(second) == words
    region.check()

    region.write([POOL | {"replicas": 2}])  # a second copy beside the first
    os.kill(region.manager, signal.SIGHUP)
    other = region.is_("p-1", "ready")
    assert other.reason.startswith("restored, after ")
    assert other.url != second.url
    assert [said(other), said(second)] == [words, words]
    assert other.kv_events != second.kv_events
    region.check()

    pages = max(image.glob("pages-*.img"), key=lambda path: path.stat().st_size)
    with pages.open("r+b") as file:
        file.seek(pages.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.kill(second.pid, signal.SIGKILL)
    third = again(region, second)
    assert not third.reason, "a cold start"
    assert said(third) == words
    os.kill(region.manager, signal.SIGTERM)
    region.until(lambda: not alive(region.manager), "the end of the manager")
    assert (region.processes(), region.engines()) == ({}, set())


def test_a_manager_that_dies_while_an_image_is_made_or_restored(region: MortalRegion) -> None:
    (region.folder / "die").write_text("after note Staged staged")
    region.until(lambda: not alive(region.manager), "a death before the dump")
    region.start()
    first = region.is_("p-0", "ready")
    region.check()
    (region.folder / "die").write_text("after spawn")
    os.kill(first.pid, signal.SIGKILL)
    region.until(lambda: not alive(region.manager), "a death in the restore")
    region.start()
    second = again(region, first)
    assert second.reason.startswith("restored, after ")
    region.check()
    assert len(region.live()) == 1
    region.until(lambda: len(region.engines()) == 1, "one engine, and no other")

    # The same when an operator wishes one of a replica that serves, here a copy.
    region.dies("after note Staged staged", lambda: region.wish("p-0", "snapshot"))
    region.start()
    third = again(region, second)
    assert third.reason.startswith("restored, after ")
    words = said(third)
    region.wish("p-0", "snapshot")
    images = region.folder / "run" / "snapshots" / "images"
    region.until(lambda: len(list(images.glob("[!.]*"))) == 2, "another image")
    after = region.is_("p-0", "ready")
    assert (after.pid, said(after)) == (third.pid, words)
    assert after.reason.startswith("image ")
    os.kill(third.pid, signal.SIGKILL)
    fourth = again(region, third)
    assert fourth.reason.startswith("restored, after ")
    assert said(fourth) == words
    region.check()


def test_one_that_dies_in_its_warm_up_serves_without_an_image(region: MortalRegion) -> None:
    region.is_("p-0", "ready")
    region.write([POOL | {"args": ["--fault", "exit:0"]}])
    os.kill(region.manager, signal.SIGHUP)
    region.until(lambda: '"cause":"exited"' in region.log, "a death in the warm-up")
    region.is_("p-0", "ready")
    assert region.log.count('"event":"image_made"') == 1, "the first one's"
    region.check()


def test_a_full_disk_costs_no_replica(tmp_path: Path) -> None:
    need_criu()
    small = tmp_path / "small"
    small.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", small], check=True)
    region = MortalRegion(tmp_path, [POOL], gpus="none", snapshot_dir=str(small))
    try:
        region.start()
        record = region.is_("p-0", "ready")
        assert said(record)
        assert "No space left on device" in region.log
        assert '"event":"no_image"' in region.log
        assert not any((small / "images").iterdir())
    finally:
        region.clean()
        subprocess.run(["umount", "-l", small], check=True)


def test_a_suspended_cell_comes_back(region: MortalRegion) -> None:
    first = region.is_("p-0", "ready")
    words = said(first)
    region.wish("p-0", "sleep?rung=suspended")
    region.is_("p-0", "ready", asleep=True)
    os.kill(region.manager, signal.SIGKILL)
    region.until(lambda: not alive(region.manager), "its death")
    region.start()
    region.is_("p-0", "ready", asleep=True)
    region.wish("p-0", "wake")
    after = region.is_("p-0", "ready")
    assert (after.pid, after.url, said(after)) == (first.pid, first.url, words)
    assert len(region.engines()) == 1
    region.wish("p-0", "sleep?rung=suspended")
    region.is_("p-0", "ready", asleep=True)
    os.kill(region.manager, signal.SIGTERM)
    region.until(lambda: not alive(region.manager), "the end of the manager")
    region.until(lambda: not region.engines(), "the end of what stood still")
