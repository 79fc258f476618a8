"""The memory that this process may use, read from files of both versions of control groups."""

from __future__ import annotations

from pathlib import Path

from proxy.core import limits
from proxy.io.memory import rooms_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def rooms(root: Path) -> list[int]:
    return sorted(room for room in rooms_bytes(root) if room is not None)


def test_version_2_counts_every_group_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a/b"
    write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 9 kB\n",
            "proc/self/cgroup": "0::/a/b\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "1\n",
            "sys/fs/cgroup/a/memory.max": "1000\n",
            "sys/fs/cgroup/a/memory.current": "300\n",
            "sys/fs/cgroup/a/memory.stat": "inactive_file 100\n",
        },
    )
    assert rooms(tmp_path) == [800, 9 * limits.KIB]


def test_version_1_is_known_too(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/\n4:blkio,memory:/a\n0::/\n",
            f"{folder}/a/memory.limit_in_bytes": "1000\n",
            f"{folder}/a/memory.usage_in_bytes": "300\n",
            f"{folder}/memory.limit_in_bytes": "5000\n",
            f"{folder}/memory.usage_in_bytes": "0\n",
        },
    )
    assert rooms(tmp_path) == [700, 5000]


def test_in_a_container_the_group_is_the_root_of_what_is_seen(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/123\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "1\n",
        },
    )
    assert rooms(tmp_path) == [999]


def test_a_machine_that_says_nothing_sets_no_limit(tmp_path: Path) -> None:
    assert rooms(tmp_path) == []


def test_this_machine_says_something() -> None:
    assert [room for room in rooms_bytes() if room]
