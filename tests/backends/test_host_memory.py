"""How much memory a machine has, and a container of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import rungs_here
from backends.host_memory import available_bytes, total_bytes

MIB = 1 << 20


def test_available_memory(tmp_path: Path) -> None:
    assert available_bytes() > 0
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path / "none") == 2 * MIB
    for text, size in (("max\n", 2 * MIB), (f"{MIB}\n", MIB), (f"{9 * MIB}\n", 2 * MIB)):
        (tmp_path / "memory.max").write_text(text)
        assert available_bytes(tmp_path / "meminfo", tmp_path / "memory.max") == size
    assert total_bytes(tmp_path / "meminfo", tmp_path / "memory.max") == 9 * 1024
    (tmp_path / "memory.max").write_text("5\n")
    assert total_bytes(tmp_path / "meminfo", tmp_path / "memory.max") == 5
    (tmp_path / "meminfo").write_text("MemAvailable: much\n")
    assert available_bytes(tmp_path / "meminfo") == 0
    assert available_bytes(tmp_path / "none") == 0


def test_replicas_at_rest_leave_a_share_to_those_that_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rungs_here, "available_bytes", lambda: 100)
    monkeypatch.setattr(rungs_here, "total_bytes", lambda: 160)
    assert rungs_here.host_bytes_free() == 90
    monkeypatch.setattr(rungs_here, "available_bytes", lambda: 0)
    assert rungs_here.host_bytes_free() == -10, "it is short of memory, not of an answer"
    monkeypatch.setattr(rungs_here, "total_bytes", lambda: 0)
    assert rungs_here.host_bytes_free() is None
