"""The CUDA driver's checkpoint calls on other processes, each made by a process of its own.

    python -m backends.snapshots.driver state|lock|checkpoint|restore|unlock PID... [--pair OLD=NEW]
    python -m backends.snapshots.driver probe

A call may wait for the driver without end, and nothing can interrupt it there: so the manager makes
none itself, but starts this program, which it can kill. It prints a line of JSON for each process,
works on all of them at once, and imports nothing of ours, so that it is there in milliseconds.

A process in a cell is spoken to from inside its namespaces, as `cuda-checkpoint` in its container
would; where the driver does not find it there, from here. The layouts are those of CUDA 13's cuda.h
(64 octets each; those of 12.8 have the same octets reserved).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

LIBRARY = "libcuda.so.1"
STATES = {0: "RUNNING", 1: "LOCKED", 2: "CHECKPOINTED", 3: "FAILED", 4: "CHECKPOINTING",
          5: "RESTORING"}  # fmt: skip
ACTIONS = ("lock", "checkpoint", "restore", "unlock")
API_VERSION_MIN = 12080  # the calls are public since CUDA 12.8, driver 570
LOCK_TIMEOUT_MS = 30_000
NOT_INITIALIZED = 3
_NAMESPACES = ("net", "pid", "mnt")  # the last one changes what /proc says
_UUID = re.compile(r"(?:GPU-)?([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})")

# What each error means here, and what helps; the names are those of cuda.h.
ADVICE = {
    "CUDA_ERROR_NOT_SUPPORTED": (
        "the driver cannot checkpoint what it uses: managed memory, MIG, MPS, multicast, memory "
        "shared between processes, or a driver without these calls"
    ),
    "CUDA_ERROR_NOT_READY": "its work on the GPU did not end in time; drain it first",
    "CUDA_ERROR_OUT_OF_MEMORY": "there is too little memory on the GPU, or on the host, for it",
    "CUDA_ERROR_ILLEGAL_STATE": "somebody else locks or checkpoints it, too",
    "CUDA_ERROR_NOT_INITIALIZED": "it uses no GPU, or the driver cannot be reached",
    "CUDA_ERROR_INVALID_VALUE": "the driver does not know it, or cannot move it to that GPU",
    "CUDA_ERROR_OPERATING_SYSTEM": "the kernel refused it; be root, or the same user",
    "CUDA_ERROR_NO_DEVICE": "there is no GPU",
}


class GpuPair(ctypes.Structure):
    """CUcheckpointGpuPair."""

    _fields_ = (("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16))


class RestoreArgs(ctypes.Structure):
    """CUcheckpointRestoreArgs."""

    _fields_ = (
        ("pairs", ctypes.POINTER(GpuPair)),
        ("count", ctypes.c_uint),
        ("reserved", ctypes.c_char * 44),
        ("reserved1", ctypes.c_uint64),
    )


class LockArgs(ctypes.Structure):
    """CUcheckpointLockArgs."""

    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


class Driver:
    """The library, loaded."""

    def __init__(self) -> None:
        """Raises `OSError` without the library, `AttributeError` where it is too old."""
        self._library = ctypes.CDLL(LIBRARY)
        self._state_of = self._library.cuCheckpointProcessGetState
        self._calls = {
            name: getattr(self._library, f"cuCheckpointProcess{name.capitalize()}")
            for name in ACTIONS
        }

    def version(self) -> int:
        """Return the newest CUDA that it has, as thousands, and its minor number as tens."""
        value = ctypes.c_int(0)
        self._library.cuDriverGetVersion(ctypes.byref(value))
        return value.value

    def state(self, pid: int) -> tuple[str, str]:
        """Return the state of a process and an empty error, or the other way round."""
        value = ctypes.c_int(-1)
        code = self._state_of(pid, ctypes.byref(value))
        return (
            (STATES.get(value.value, str(value.value)), "") if not code else ("", self.name(code))
        )

    def act(self, action: str, pid: int, pairs: Sequence[GpuPair]) -> str:
        """Make one call; return the name of its error, empty where there was none."""
        arguments: Any = (ctypes.c_uint64 * 8)()
        if action == "lock":
            arguments = LockArgs(timeout_ms=LOCK_TIMEOUT_MS)
        elif pairs and action == "restore":
            array = (GpuPair * len(pairs))(*pairs)
            arguments = RestoreArgs(pairs=array, count=len(pairs))
        code = self._calls[action](pid, ctypes.byref(arguments))
        if code == NOT_INITIALIZED and action == "restore" and not self._library.cuInit(0):
            # Without persistence mode the driver has to be up before it restores (its manual).
            code = self._calls[action](pid, ctypes.byref(arguments))
        return self.name(code) if code else ""

    def name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or f"error {code}".encode()).decode()


def probe() -> dict[str, Any]:
    """Say whether these calls are here, and why not."""
    try:
        version = Driver().version()
    except OSError:
        return {"works": False, "reason": f"there is no {LIBRARY}: no NVIDIA driver is installed"}
    except AttributeError:
        return {"works": False, "reason": "the NVIDIA driver is too old; it must be 570 or newer"}
    if version < API_VERSION_MIN:
        told = f"{version // 1000}.{version % 1000 // 10}"
        return {"works": False, "reason": f"the driver has CUDA {told}; 12.8 is needed (570)"}
    return {"works": True, "reason": "", "cuda": version}


def pair_of(text: str) -> GpuPair:
    """Read `OLD=NEW`, two UUIDs as nvidia-smi writes them. Raises `ValueError`."""
    found = [_UUID.fullmatch(part) for part in text.split("=")]
    if len(found) != 2 or not (found[0] and found[1]):
        raise ValueError(f"'{text}' is not OLD=NEW, two UUIDs of GPUs")
    old, new = (bytes.fromhex(match[1].replace("-", "")) for match in found if match)
    return GpuPair((ctypes.c_ubyte * 16)(*old), (ctypes.c_ubyte * 16)(*new))


def work(action: str, pid: int, pairs: Sequence[GpuPair]) -> dict[str, Any]:
    """Do it from where the driver finds the process; return what came of it."""
    tries: list[Callable[[], dict[str, Any]]] = [lambda: _call(action, pid, pid, pairs)]
    inner = inner_pid(pid)
    if inner is not None:
        inside = inner
        tries.insert(0, lambda: _forked(pid, lambda: _inside(action, pid, inside, pairs)))
    report: dict[str, Any] = {}
    for attempt in tries:
        report = attempt()
        if report.get("state"):
            break
    return report


def inner_pid(pid: int) -> int | None:
    """Return its number where it lives, if it lives in namespaces of its own."""
    try:
        if all(
            os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")
            for name in ("net", "pid")
        ):
            return None
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            numbers = next(line for line in status if line.startswith("NSpid:"))
        return int(numbers.split()[-1])
    except (OSError, StopIteration, ValueError):
        return None  # gone, or not for us to see


def _inside(action: str, pid: int, inner: int, pairs: Sequence[GpuPair]) -> dict[str, Any]:
    """Enter its namespaces and call from a child, which is the first to be in the one of pids."""
    Driver()  # loaded from the files of this side
    fds = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES]
    libc = ctypes.CDLL(None, use_errno=True)
    for name, fd in zip(_NAMESPACES, fds, strict=True):
        if libc.setns(fd, 0):
            reason = os.strerror(ctypes.get_errno())
            return _report(pid, action, error=f"its {name} namespace cannot be entered: {reason}")
    return _forked(pid, lambda: _call(action, pid, inner, pairs))


def _call(action: str, pid: int, seen_as: int, pairs: Sequence[GpuPair]) -> dict[str, Any]:
    driver = Driver()
    state, error = driver.state(seen_as)
    if action == "state" or not state:
        return _report(pid, action, state, error)
    begun_s = time.perf_counter()
    error = driver.act(action, seen_as, pairs)
    took_s = time.perf_counter() - begun_s
    return _report(pid, action, driver.state(seen_as)[0] or state, error, took_s)


def _report(
    pid: int, action: str, state: str = "", error: str = "", took_s: float = 0.0
) -> dict[str, Any]:
    return {"pid": pid, "action": action, "state": state, "error": error,
            "took_s": round(took_s, 4)}  # fmt: skip


def _forked(pid: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `call` returns in a child, which may change what it is as it likes."""
    return _answer(pid, *_fork(pid, call))


def _fork(pid: int, call: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    with suppress(BaseException):  # whatever happens, this child must not go on as its parent
        try:
            report = call()
        except OSError as error:
            report = _report(pid, "", error=str(error))
        os.write(writing, json.dumps(report).encode())
        status = 0
    os._exit(status)


def _answer(pid: int, child: int, reading: int) -> dict[str, Any]:
    with open(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    report: dict[str, Any] = (
        json.loads(text) if text else _report(pid, "", error="the driver's library died of it")
    )
    return report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="backends.snapshots.driver", allow_abbrev=False)
    parser.add_argument("action", choices=("probe", "state", *ACTIONS))
    parser.add_argument("pids", nargs="*", type=int)
    parser.add_argument("--pair", action="append", default=[], metavar="OLD=NEW")
    options = parser.parse_args(argv)
    try:
        pairs = [pair_of(text) for text in options.pair]
    except ValueError as error:
        parser.error(str(error))
    if options.action == "probe":
        reports = [probe()]
    else:
        forks = [
            (pid, *_fork(pid, lambda pid=pid: work(options.action, pid, pairs)))  # type: ignore[misc]
            for pid in options.pids
        ]
        reports = [_answer(*fork) for fork in forks]
    sys.stdout.write("".join(json.dumps(report) + "\n" for report in reports))
    return 0 if all(not report.get("error") for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
