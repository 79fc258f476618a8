"""The record of what was started: what a crash may lose, and what it may not."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import journal as module
from backends.journal import (
    Ended,
    Entry,
    Held,
    Journal,
    Launch,
    Nap,
    Ready,
    Staged,
    Started,
    Suspension,
    replay,
)


def launch(launch_id: str, replica_id: str = "m-0") -> Launch:
    return Launch(
        launch_id=launch_id,
        replica_id=replica_id,
        launch_hash="h",
        engine="vllm",
        model="m",
        pool="m",
        port=20_000,
        stop_grace_s=30.0,
        starts=1,
        at_s=1.0,
    )


def test_entries_survive_a_new_reader(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path)
    for entry in (
        launch("a"),
        Started("a", 7, 70, "boot"),
        Ready("a"),
        Held("a", held=True),
        launch("b"),
        launch("c"),
        Ended("c", "exited"),
    ):
        first.append(entry)
    first.close()
    second = Journal(path)
    second.close()
    assert list(second.live) == ["a", "b"]
    assert second.live["a"] == msgspec.structs.replace(
        launch("a"), pid=7, start_ticks=70, boot_id="boot", ready=True, held=True
    )
    assert second.live["b"].pid == 0, "an intent without a process is known"
    assert second.damaged_lines == 0
    assert len(path.read_text().splitlines()) == 2, "compacted at start"
    assert path.stat().st_mode & 0o777 == 0o600


def test_how_deep_it_sleeps_survives_a_new_reader(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    seen = []
    for entry in (launch("a"), Nap("a", 2, True), Nap("a", 2, False), Nap("a", None, False)):
        journal = Journal(path)
        journal.append(entry)
        journal.close()
        again = Journal(path)
        again.close()
        seen.append((again.live["a"].nap_level, again.live["a"].turning))
    assert seen == [(None, False), (2, True), (2, False), (None, False)]


def test_an_earlier_managers_entries_are_read() -> None:
    line = (
        b'{"entry":"intent","launch_id":"a","replica_id":"m-0","launch_hash":"h","engine":"vllm",'
        b'"model":"m","pool":"m","port":20000,"stop_grace_s":30.0,"starts":1,"at_s":1.0}'
    )
    live, damaged = replay([line])
    assert (live, damaged) == ({"a": launch("a")}, 0)
    assert (live["a"].ports, live["a"].nap_level, live["a"].kv_source) == ({}, None, None)


def test_a_torn_line_is_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lines = [msgspec.json.encode(launch(name)) for name in ("a", "b")]
    path.write_bytes(lines[0] + b"\n" + lines[1][:40])
    journal = Journal(path)
    journal.append(launch("c"))
    journal.close()
    again = Journal(path)
    again.close()
    assert (journal.damaged_lines, sorted(again.live)) == (1, ["a", "c"])


def test_a_failed_write_changes_nothing_and_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    write = os.write

    def short_write(fd: int, content: bytes) -> int:
        return write(fd, content[:20])

    monkeypatch.setattr(os, "write", short_write)
    with pytest.raises(OSError, match="is it full"):
        journal.append(launch("a"))
    monkeypatch.undo()
    assert not journal.live
    journal.append(launch("b"))
    journal.close()
    again = Journal(path)
    again.close()
    assert list(again.live) == ["b"]
    assert again.damaged_lines == 1


def test_it_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOURNAL_BYTES_MAX", 4_000)
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append(launch("kept"))
    for number in range(60):
        journal.append(launch(str(number)))
        journal.append(Ended(str(number), "exited"))
        assert path.stat().st_size < 5_000
    journal.close()
    again = Journal(path)
    again.close()
    assert list(again.live) == ["kept"]


ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(launch, st.sampled_from("abc")),
    st.builds(Started, st.sampled_from("abc"), st.just(7), st.just(70), st.just("boot")),
    st.builds(Ready, st.sampled_from("abc")),
    st.builds(Held, st.sampled_from("abc"), st.booleans()),
    st.builds(Nap, st.sampled_from("abc"), st.sampled_from([None, 1]), st.booleans()),
    st.builds(
        Suspension,
        st.sampled_from("abc"),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, (), ("0",)]),
    ),
    st.builds(Staged, st.sampled_from("abc"), st.booleans()),
    st.builds(Ended, st.sampled_from("abc"), st.just("exited")),
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(ENTRIES, max_size=30), st.integers(0, 400))
def test_a_cut_at_any_octet_loses_at_most_the_last_entry(entries: list[Entry], cut: int) -> None:
    lines = [msgspec.json.encode(entry) for entry in entries]
    whole = b"".join(line + b"\n" for line in lines)
    kept = whole[: max(0, len(whole) - cut)]
    complete = kept.count(b"\n")
    live, damaged = replay(kept.split(b"\n"))
    exact, _ = replay(lines[:complete])
    more, _ = replay(lines[: complete + 1])
    assert damaged <= 1
    assert live in (exact, more)


@pytest.mark.parametrize("line", [b"{}", b"[]", b"\xff\xfe", b'{"entry":"other"}', b"0"])
def test_nonsense_is_counted_not_believed(line: bytes) -> None:
    assert replay([line, b"", b"  "]) == ({}, 1)
