"""Suspension: what a replica's processes hold on GPUs goes to host memory, and comes back.

The driver does it process by process (`driver`): lock (its calls wait, its work ends), checkpoint
(memory moves to the host, the GPU is let go of), restore, unlock. All are locked before the first
is moved, so that what fails early fails with every byte in its place; then they move at once. A
failure is taken back as far as the driver lets us, and `intact` says whether that was all the way.
The states that the driver tells are believed, and nothing is remembered here: so each call can be
made again, by a manager that knows nothing of the one before, too.

An engine without a GPU is frozen in its stead (`Freezer`), so that whatever suspends can be tried
anywhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from backends.engines.base import Engine
from backends.host_memory import available_bytes
from backends.inventory import ask, card_use
from backends.nvidia_smi import QUERY_CARDS, read_cards
from backends.snapshots.asking import Asking
from backends.snapshots.base import Capability, Suspender, SuspendError
from backends.snapshots.driver import ADVICE
from backends.snapshots.tree import (
    catches,
    members,
    open_devices,
    resident_bytes,
)

Action = Literal["state", "lock", "checkpoint", "restore", "unlock"]
# A lock ends by itself after 30 s; memory of the host that nobody has touched yet takes 0.5 GB/s
# and more, so that a whole card of 141 GB is there within 5 minutes.
TIMEOUTS_S: Mapping[Action, float] = {
    "state": 10.0,
    "lock": 45.0,
    "checkpoint": 300.0,
    "restore": 180.0,
    "unlock": 20.0,
}
PROBE_TIMEOUT_S = 20.0
MOVES_SINCE = 13000  # the CUDA, driver 580, that restores on other cards of the same model
FROZEN_S_MAX = 5.0
POLL_S = 0.02
NVML_SIGNAL = signal.SIGUSR2  # `hook` lets go of NVML at it
NVML_CLOSED_S_MAX = 2.0
HOST_SHARE = 0.95  # of what is available may be filled
_MIB = 1 << 20
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class Report(msgspec.Struct, frozen=True):
    """What the driver says of one process."""

    pid: int = 0
    action: str = ""
    state: str = ""
    error: str = ""
    took_s: float = 0.0


class DriverSuspender:
    """By the CUDA driver's checkpoint calls."""

    def __init__(self) -> None:
        self._asking = Asking(_probe, lambda found: found.works)

    def probe(self) -> Capability:
        return self._asking.answer()

    async def suspend(self, pid: int) -> int:
        tree = [member.pid for member in members(pid)]
        states = await self._states(pid, tree)
        await asyncio.to_thread(_refuse_without_room, tree)
        _close_nvml(tree)
        before_bytes = resident_bytes(states)
        try:
            await _step("lock", [one for one, state in states.items() if state == "RUNNING"])
            await _step("checkpoint", [p for p, state in states.items() if state != "CHECKPOINTED"])
        except SuspendError as error:
            intact = await self._take_back(pid)
            raise SuspendError(f"it could not be suspended: {error}", intact=intact) from error
        await _nvml_closed(tree)
        return max(0, resident_bytes(states) - before_bytes)

    async def resume(self, pid: int, devices: Mapping[str, str] | None = None) -> None:
        tree = [member.pid for member in members(pid)]
        states = await self._states(pid, tree)
        moved = {old: new for old, new in (devices or {}).items() if old != new}
        suspended = [one for one, state in states.items() if state == "CHECKPOINTED"]
        try:
            await _restore(suspended, await asyncio.to_thread(_mappings, moved))
            await _step("unlock", [one for one, state in states.items() if state != "RUNNING"])
        except SuspendError as error:
            after = {report.state for report in await _call("state", suspended)}
            intact = bool(suspended) and after == {"CHECKPOINTED"}
            raise SuspendError(f"it could not be resumed: {error}", intact=intact) from error

    async def _states(self, pid: int, tree: Sequence[int]) -> dict[int, str]:
        """Return the state of each process that uses a GPU. Raises `SuspendError`."""
        if not tree:
            raise SuspendError(f"process {pid} is gone", intact=False)
        reports = await _call("state", tree)
        states = {report.pid: report.state for report in reports if report.state}
        if not states:
            said = next((report.error for report in reports if report.error), "nothing")
            raise SuspendError(
                f"no process of it uses a GPU, as the driver says ({_told(said)})", intact=True
            )
        if failed := [one for one, state in states.items() if state == "FAILED"]:
            raise SuspendError(f"the driver has lost process {failed[0]}", intact=False)
        return states

    async def _take_back(self, pid: int) -> bool:
        """Let everything run again after a failure; say whether everything does."""
        try:
            await self.resume(pid)
            states = await self._states(pid, [member.pid for member in members(pid)])
        except SuspendError:
            return False
        return set(states.values()) == {"RUNNING"}


class Freezer:
    """By SIGSTOP: for an engine without a GPU, whose memory need not move."""

    def probe(self) -> Capability:
        return Capability(works=True, moves=True)  # it is on no card

    async def suspend(self, pid: int) -> int:
        """Stop parents first: what they would start meanwhile is found by the next look."""
        deadline_s = asyncio.get_running_loop().time() + FROZEN_S_MAX
        while True:
            tree = members(pid)
            if not tree:
                raise SuspendError(f"process {pid} is gone", intact=False)
            running = [member.pid for member in tree if not member.stopped]
            if not running:
                return 0
            if asyncio.get_running_loop().time() > deadline_s:
                _signal((member.pid for member in tree), signal.SIGCONT)
                raise SuspendError(f"process {running[0]} does not stop", intact=True)
            _signal(running, signal.SIGSTOP)
            await asyncio.sleep(POLL_S)

    async def resume(self, pid: int, devices: Mapping[str, str] | None = None) -> None:
        tree = members(pid)
        if not tree:
            raise SuspendError(f"process {pid} is gone", intact=False)
        _signal((member.pid for member in reversed(tree)), signal.SIGCONT)


# --- the driver's calls -----------------------------------------------------------------------


def _command(action: str, pids: Iterable[int] = (), pairs: Iterable[str] = ()) -> list[str]:
    # -S -E: it needs no package, and nothing of ours may change it; -c keeps our own path apart.
    words = [sys.executable, "-S", "-E", "-m", "backends.snapshots.driver", action]
    words += [str(pid) for pid in pids]
    for pair in pairs:
        words += ["--pair", pair]
    return words


def _probe() -> Capability:
    try:
        ran = subprocess.run(  # noqa: S603  # our own program
            _command("probe"),
            cwd=_PACKAGE_PARENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        told = json.loads(ran.stdout or b"{}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Capability(works=False, reason=f"the NVIDIA driver does not answer: {error}")
    moves = told.get("cuda", 0) >= MOVES_SINCE
    return Capability(
        works=bool(told.get("works")), reason=str(told.get("reason", "")), moves=moves
    )


async def _step(action: Action, pids: Sequence[int], pairs: Sequence[str] = ()) -> None:
    """Make one call on each of `pids`, at once. Raises `SuspendError`."""
    for report in await _call(action, pids, pairs):
        if report.error:
            text = f"{action} of process {report.pid}: {_told(report.error)}"
            raise SuspendError(text, intact=False)


async def _restore(pids: Sequence[int], mappings: Sequence[Sequence[str]]) -> None:
    """Restore by the first of `mappings` that the driver takes. Raises `SuspendError`."""
    left = list(pids)
    for number, pairs in enumerate(mappings):
        reports = await _call("restore", left, pairs)
        failed = [report for report in reports if report.error]
        left = [report.pid for report in failed]
        again = failed and all(report.state == "CHECKPOINTED" for report in failed)
        if failed and not (again and number + 1 < len(mappings)):
            text = f"restore of process {left[0]}: {_told(failed[0].error)}"
            raise SuspendError(text, intact=False)


async def _call(
    action: Action, pids: Sequence[int], pairs: Sequence[str] = ()
) -> tuple[Report, ...]:
    """Return what came of a call on each of `pids`, by a process that is killed when it hangs."""
    if not pids:
        return ()
    process = await asyncio.create_subprocess_exec(
        *_command(action, pids, pairs),
        cwd=_PACKAGE_PARENT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(TIMEOUTS_S[action]):
            output, _ = await process.communicate()
    except TimeoutError:
        text = f"no answer from the driver in {TIMEOUTS_S[action]:g} s"
        return tuple(Report(pid, action, error=text) for pid in pids)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found = []
    with suppress(msgspec.MsgspecError):  # half a line is that of one that was killed
        found = [msgspec.json.decode(line, type=Report) for line in output.splitlines()]
    if len(found) != len(pids):
        text = "the process that speaks to the driver died"
        return tuple(Report(pid, action, error=text) for pid in pids)
    return tuple(found)


def _told(error: str) -> str:
    return f"{error}: {ADVICE[error]}" if error in ADVICE else error


def _mappings(moved: Mapping[str, str]) -> list[list[str]]:
    """Return which cards to name to the driver, the likeliest first.

    It wants every card that a process has seen, those that stay too, and each new one once
    (NVIDIA/cuda-checkpoint, issue 35): so a swap among all cards of the machine. Where a process
    has seen its own alone, just that one.
    """
    if not moved:
        return [[]]
    text, _ = ask(QUERY_CARDS)
    whole = {card.uuid: card.uuid for card in read_cards(text or "")}
    for old, new in moved.items():
        here = next((one for one, taken in whole.items() if taken == new), None)
        if here is not None and old in whole:
            whole[here] = whole[old]
        whole[old] = new
    narrow = [f"{old}={new}" for old, new in moved.items()]
    return [[f"{old}={new}" for old, new in whole.items()], narrow]


def _refuse_without_room(tree: Sequence[int]) -> None:
    """Raise `SuspendError` where the host has no memory for what is on the card."""
    known = set(tree)
    needed = sum(user.used_mib for user in card_use().users if user.pid in known) * _MIB
    room = available_bytes()
    if room and needed > room * HOST_SHARE:
        raise SuspendError(
            f"it holds {needed >> 30} GiB of GPU memory, and the host has {room >> 30} GiB free; "
            "put it to sleep first, or give it a smaller KV cache",
            intact=True,
        )


# --- NVML -------------------------------------------------------------------------------------


def _close_nvml(tree: Iterable[int]) -> None:
    """Have processes that hold a device open, and have our hook, let go of NVML."""
    for pid in tree:
        if open_devices(pid, "/dev/nvidia") and catches(pid, NVML_SIGNAL):
            _signal((pid,), NVML_SIGNAL)


async def _nvml_closed(tree: Sequence[int]) -> None:
    """Wait a little until no device is open; a dump will say so where one is."""
    for _ in range(int(NVML_CLOSED_S_MAX / POLL_S)):
        held = [p for p in tree if open_devices(p, "/dev/nvidia") and catches(p, NVML_SIGNAL)]
        if not held:
            return
        await asyncio.sleep(POLL_S)


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


# --- one of each for all replicas ------------------------------------------------------------

_FREEZER, _DRIVER = Freezer(), DriverSuspender()


def suspender_of(engine: Engine) -> Suspender:
    """Return what suspends the replicas of an engine."""
    return _DRIVER if engine.uses_gpu else _FREEZER
