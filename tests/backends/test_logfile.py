"""Logs that others write to, kept bounded."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

from backends.log import Log
from backends.logfile import bound, last_lines, open_log


def test_a_long_log_is_cut_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "m-0.log"
    fd = open_log(path)
    os.write(fd, b"".join(b"%05d\n" % number for number in range(1000)))
    assert not bound(path, bytes_max=6000, kept_bytes=60)
    os.write(fd, b"over\n")
    assert bound(path, bytes_max=6000, kept_bytes=60)
    os.write(fd, b"after\n")
    os.close(fd)
    assert path.read_bytes() == b"after\n", "the writer goes on at the new end"
    kept = path.with_name("m-0.log.1").read_bytes()
    assert len(kept) == 60
    assert kept.endswith(b"00999\nover\n")


def test_a_log_that_is_not_there_needs_nothing(tmp_path: Path) -> None:
    assert not bound(tmp_path / "none")
    assert last_lines(tmp_path / "none", 3) == []


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb\n\xff\nd\n")
    assert last_lines(path, 2) == ["\\xff", "d"]


def test_events_are_lines_of_json() -> None:
    stream = io.StringIO()
    log = Log(stream)
    log.tell("plain")
    log.caution("heard", text="two\nlines", long="x" * 9_999)
    log.fault("loud", number=3)
    plain, first, second = map(json.loads, stream.getvalue().splitlines())
    assert (plain["level"], plain["event"]) == ("info", "plain")
    assert (first["level"], first["event"], first["text"]) == ("warning", "heard", "two\nlines")
    assert len(first["long"]) == 2_000
    assert (second["level"], second["number"]) == ("error", 3)
