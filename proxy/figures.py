"""What the supervisor knows of its own house: reloads, certificates, the processes of its workers.

What a process uses is read off /proc when somebody asks; the system has it right, and nothing needs
to be told. Where there is no /proc nothing is said.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

from proxy import tls
from proxy.config import ProxyConfig
from proxy.io.telemetry import Sample

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_UTIME, _STIME = 11, 12  # of the fields that follow the name (proc_pid_stat(5): 14 and 15)


class Figures:
    """Counted since this proxy came up."""

    def __init__(self) -> None:
        self._results = {"success": 0, "failure": 0}
        self._good = True
        self._good_at_s = time.time()
        self._ends: dict[str, float] = {}

    def know(self, config: ProxyConfig) -> None:
        """These are the files now: look when their certificates end."""
        self._ends = {name: ends.timestamp() for name, ends in tls.ends(config).items()}

    def reloaded(self, *, good: bool) -> None:
        """The configuration was read again; `good`: it is in force."""
        self._results["success" if good else "failure"] += 1
        self._good = good
        if good:
            self._good_at_s = time.time()

    def samples(self, pids: Mapping[int, int]) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges; `pids` are those of the workers, by place."""
        counters = [
            Sample("config_reloads_total", (("result", result),), count)
            for result, count in self._results.items()
        ]
        gauges = [
            Sample("config_last_reload_successful", (), float(self._good)),
            Sample("config_last_reload_success_timestamp_seconds", (), self._good_at_s),
            *(
                Sample("tls_certificate_not_after_timestamp_seconds", (("setting", name),), at_s)
                for name, at_s in self._ends.items()
            ),
        ]
        for place, pid in pids.items():
            by = (("worker", str(place)),)
            with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
                counters.append(Sample("worker_cpu_seconds_total", by, _cpu_s(pid)))
                gauges += [
                    Sample("worker_resident_memory_bytes", by, _resident_bytes(pid)),
                    Sample("worker_open_fds", by, len(os.listdir(f"/proc/{pid}/fd"))),
                    Sample("worker_max_fds", by, _fds_max(pid)),
                ]
        return counters, gauges


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
        return file.read()


def _cpu_s(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_S


def _resident_bytes(pid: int) -> int:
    return int(_read(pid, "statm").split()[1]) * _PAGE_BYTES


def _fds_max(pid: int) -> float:
    for line in _read(pid, "limits").splitlines():
        if line.startswith("Max open files"):
            soft = line.split()[3]
            return float("inf") if soft == "unlimited" else int(soft)
    raise ValueError("no limit of open files")
