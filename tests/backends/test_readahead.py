"""Files of a start: told by the hook in a real Python, kept, fetched, and found stale."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backends.engines.dumps import HOOK
from backends.log import Log
from backends.readahead import (
    LISTS_MAX,
    VARIABLE,
    Lists,
    Read,
    Record,
    fetch,
    gathered,
    main,
    read_list,
    record_start,
    united,
)
from backends.warm import Warmer

PROGRAM = "import json, colorsys, signal; print(1, flush=True); signal.pause(); signal.pause()"


def python(prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": HOOK, VARIABLE: prefix},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_start_tells_its_modules_in_order_and_touched_parts_of_libraries(tmp_path: Path) -> None:
    prefix = str(tmp_path / "e-1.x")
    process = python(prefix)
    try:
        record = record_start("e-1", prefix, process.pid)
    finally:
        end(process)
    assert record is not None
    names = [Path(read.path).name.partition(".")[0] for read in record.reads]
    assert names.index("json") if "json" in names else "decoder" in names
    assert names.index("decoder") < names.index("colorsys")
    mapped = [read for read in record.reads if read.parts]
    assert any("libc" in read.path or "python" in read.path for read in mapped)
    for read in mapped:
        assert all(0 <= start < read.size_bytes for start, _ in read.parts)
    assert not list(tmp_path.glob("e-1.x*"))  # what was told is put together, and gone


def test_nobody_tells_without_the_hook(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert record_start("e", str(tmp_path / "e.x"), process.pid) is None
        process.kill()


def test_parts_are_united() -> None:
    assert united([(10, 5), (0, 4), (12, 10), (4, 2), (40, 1)]) == ((0, 6), (10, 12), (40, 1))
    assert gathered("e", "/nowhere/e") is None


def read_of(path: Path, *parts: tuple[int, int]) -> Read:
    status = path.stat()
    return Read(str(path), status.st_size, status.st_mtime_ns, parts)


def test_fetching_reads_what_is_as_it_was(tmp_path: Path) -> None:
    whole, part, changed = (tmp_path / name for name in ("whole", "part", "changed"))
    for path in (whole, part, changed):
        path.write_bytes(bytes(3_000_000))
    reads = [read_of(whole), read_of(part, (4096, 8192), (2_999_000, 10_000)), read_of(changed)]
    changed.write_bytes(b"new")
    reads.append(Read(str(tmp_path / "gone"), 1, 1))
    done = fetch(reads)
    assert (done.files, done.stale) == (2, 2)
    assert done.read_bytes == 3_000_000 + 8192 + 1000
    stopped = threading.Event()
    stopped.set()
    assert fetch(reads, stopped).read_bytes == 0


def test_lists_are_few_and_whole(tmp_path: Path) -> None:
    lists = Lists(tmp_path / "reads")
    read = Read("/x", 1, 1)
    for number in range(LISTS_MAX + 2):
        lists.keep(Record(1, f"vllm 0.{number}", (read,)))
        os.utime(tmp_path / "reads" / f"vllm-0.{number}.json", ns=(number, number))
    assert lists.find("vllm 0.0") is None
    found = lists.find(f"vllm 0.{LISTS_MAX + 1}")
    assert found is not None
    assert found.reads == (read,)
    (tmp_path / "reads" / f"vllm-0.{LISTS_MAX}.json").write_text("{")
    assert lists.find(f"vllm 0.{LISTS_MAX}") is None
    lists.keep(Record(0, "vllm 0.9", (read,)))  # of another form
    assert lists.find("vllm 0.9") is None


def test_what_processes_tell_at_their_end_does_not_pile_up(tmp_path: Path) -> None:
    lists = Lists(tmp_path)
    lists.keep(Record(1, "e 1", ()))
    for name in ("e-1.aa.17", "e-1.bb.17.new", "e-1.cc.18"):
        (tmp_path / name).touch()
        if "cc" not in name:
            os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / "e-1.json", (0, 0))
    assert Path(lists.told_at("e 2")).parent == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {"e-1.json", "e-1.cc.18"}


async def test_the_first_start_is_recorded_and_the_next_one_fetched(tmp_path: Path) -> None:
    told = io.StringIO()
    lists = Lists(tmp_path)
    warmer = Warmer(Log(told), lists=lists)
    environ: dict[str, str] = {}
    warmer.ahead("vllm 1", environ)
    process = python(environ[VARIABLE])
    try:
        warmer.answered(process.pid)
        await warmer.idle()
        record = lists.find("vllm 1")
        assert record is not None
        assert record.bytes_in_all > 100_000
        again: dict[str, str] = {}
        warmer.ahead("vllm 1", again)
        await warmer.idle()
        assert again == {}
        assert "read_ahead" in told.getvalue()
        warmer.answered(process.pid)  # of which all is known
        stale = tuple(Read(read.path, 0, 0) for read in record.reads)
        lists.keep(Record(1, record.name, stale))
        warmer.ahead("vllm 1", again)
        await warmer.idle()
        assert lists.find("vllm 1") is None  # nothing of it is as it was: to be made anew
    finally:
        end(process)
        await warmer.close()


async def test_nothing_is_recorded_where_nothing_is_warmed(tmp_path: Path) -> None:
    warmer = Warmer(Log(io.StringIO()), enabled=False, lists=Lists(tmp_path))
    environ: dict[str, str] = {}
    warmer.ahead("vllm 1", environ)
    warmer.answered(os.getpid())
    await asyncio.sleep(0)
    assert environ == {}
    await warmer.close()


def test_a_command_is_recorded_and_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.json"
    command = ["--", sys.executable, "-c", "import colorsys"]
    assert main(["--record", "--list", str(listed), *command]) == 0
    record = read_list(listed)
    assert record is not None
    assert any("colorsys" in read.path for read in record.reads)
    assert main(["--list", str(listed), *command]) == 0
    assert '"fetched_mib"' in capsys.readouterr().out
    assert main(["--record", "--list", str(listed), "--", "true"]) == 1
    assert "nothing told what it read" in capsys.readouterr().err
    assert main(["--until", "http://127.0.0.1:9/", "--", "false"]) == 1
    assert "ended with 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--record", "--", "true"])


def test_the_signal_is_one_that_nobody_uses() -> None:
    assert signal.SIGRTMIN + 5 < signal.SIGRTMAX
