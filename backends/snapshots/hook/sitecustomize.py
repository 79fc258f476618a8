"""Lets an outside process ask two things of this Python, by signals.

SIGUSR2: to let go of NVML. NVML keeps /dev/nvidia* open, which no dump of a process can save.
Whoever initialised it counts, so it is shut down until it says that it is; those who need it later
initialise it again, as they must after each of their own shutdowns.

The sixth real-time signal, where `DOHERTY_READS` names a file: to tell what it has read (`reads`).
It does so at its end, too.

Python imports a module of this name from each folder of its path once, at its start; the one that
this hides is run in its turn.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import signal
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = "libnvidia-ml.so.1"
_TIMES_MAX = 64
_READS = os.environ.get("DOHERTY_READS", "")


def _let_go(_number: int, _frame: object) -> None:
    with contextlib.suppress(OSError):  # there is no NVML
        library = ctypes.CDLL(_LIBRARY)
        for _ in range(_TIMES_MAX):
            if library.nvmlShutdown():
                return


def _tell_reads(*_: object) -> None:
    with contextlib.suppress(OSError):  # nobody can be told
        spec = importlib.util.spec_from_file_location("_reads", os.path.join(_HERE, "reads.py"))
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.tell(_READS)


def _run_hidden() -> None:
    """Run the module of this name that would have been found without this folder."""
    path = [place for place in sys.path if os.path.abspath(place or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


with contextlib.suppress(ValueError):  # not the main thread
    signal.signal(signal.SIGUSR2, _let_go)
    if _READS:
        atexit.register(_tell_reads)
        signal.signal(signal.SIGRTMIN + 5, _tell_reads)
_run_hidden()
