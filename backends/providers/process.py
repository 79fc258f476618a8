"""Engines as processes of this machine (Linux).

Each engine leads a session of its own: the terminal's Ctrl-C does not reach it, it outlives a
manager that is killed, and one signal to its group reaches every worker that it started. Its end is
seen through a pidfd, which works alike for children and for adopted processes that are not ours.
While a dead child has not been reaped its pid and group id cannot be given to anybody else, so the
remains of its group are killed before it is reaped: an engine core that outlived its server would
keep the GPU's memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.engines.base import Engine
from backends.engines.probe import Program, program_of
from backends.journal import Launch
from backends.logfile import open_log
from backends.providers.base import LAUNCH_ID_VARIABLE, Process
from backends.spec import ReplicaSpec

_PROC = Path("/proc")
_RESET_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


class ProcessStat(msgspec.Struct, frozen=True):
    """What `/proc/PID/stat` says that matters here."""

    pid: int
    state: str
    group: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        return self.state not in {"Z", "X"}


class LocalProcess:
    """A process that is watched until it ends; `owned` when it is our child."""

    def __init__(self, pid: int, start_ticks: int, launch_id: str, *, owned: bool) -> None:
        """Raises `OSError` when the process is gone already."""
        self.pid = pid
        self.start_ticks = start_ticks
        self.placed = None
        self.waits = ""
        self._launch_id = launch_id
        self._owned = owned
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[str] = self._loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        try:
            self._loop.add_reader(self._pidfd, self._ended)
        except OSError:
            os.close(self._pidfd)
            raise

    def signal_group(self, number: int) -> None:
        if self._pidfd < 0 or not self._same():
            return
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def release(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _same(self) -> bool:
        stat = read_stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks

    def _ended(self) -> None:
        self.release()
        if self._owned:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            how = describe_status(status)
        else:
            kill_remains({self._launch_id})
            how = "exited"
        if not self.exited.done():
            self.exited.set_result(how)


class ProcessProvider:
    """Starts engines as children and adopts those of a manager before."""

    def __init__(self) -> None:
        self.boot_id = boot_id()

    def program(self, engine: Engine, spec: ReplicaSpec) -> Program:
        """Return what is installed here. Raises `EngineMissingError`."""
        return program_of(engine, spec, os.environ)

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], launch_id: str, log_path: Path
    ) -> Process:
        """Start `argv` with its output appended to `log_path`. Raises `OSError`."""
        log_fd = open_log(log_path)
        try:
            pid = os.posix_spawnp(
                argv[0],
                list(argv),
                {**env, LAUNCH_ID_VARIABLE: launch_id},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log_fd, 1),
                    (os.POSIX_SPAWN_DUP2, log_fd, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=_RESET_SIGNALS,
            )
        finally:
            with suppress(OSError):  # a full or distant disk may say so here; the child lives
                os.close(log_fd)
        try:
            return _child(pid, launch_id)
        except OSError:  # out of descriptors: what cannot be watched must not run
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def recover(self, launches: Iterable[Launch]) -> Mapping[str, Process]:
        """Find each launch by its identity, or by the launch id that its processes carry."""
        launches = list(launches)
        found: dict[str, Process] = {}
        carriers = find_carriers({launch.launch_id for launch in launches})
        for launch in launches:
            leader = self._leader(launch, carriers.get(launch.launch_id, []))
            if leader is None:
                continue
            with suppress(OSError):
                found[launch.launch_id] = LocalProcess(
                    leader.pid, leader.start_ticks, launch.launch_id, owned=False
                )
        kill_remains({launch.launch_id for launch in launches} - set(found))
        return found

    def _leader(self, launch: Launch, carriers: Sequence[ProcessStat]) -> ProcessStat | None:
        if launch.pid and launch.boot_id == self.boot_id:
            stat = read_stat(launch.pid)
            if stat is not None and stat.alive and stat.start_ticks == launch.start_ticks:
                return stat
        if launch.pid:
            return None  # it has ended; its number may be another's by now
        return next((stat for stat in carriers if stat.pid == stat.group), None)


def boot_id() -> str:
    """Return what names this life of the machine: a pid says nothing in another one."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _child(pid: int, launch_id: str) -> LocalProcess:
    """Watch our child, which stays in the table until we reap it. Raises `OSError`."""
    stat = read_stat(pid)
    if stat is None:
        raise OSError(f"/proc/{pid}/stat cannot be read; are too many files open?")
    return LocalProcess(pid, stat.start_ticks, launch_id, owned=True)


def read_stat(pid: int) -> ProcessStat | None:
    """Return what the kernel says of `pid`; None when there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # proc(5): the second field is the name in parentheses, which may hold anything, ")" too.
    fields = text[text.rfind(b")") + 2 :].split()
    return ProcessStat(pid, fields[0].decode(), int(fields[2]), int(fields[19]))


def find_carriers(launch_ids: set[str]) -> dict[str, list[ProcessStat]]:
    """Return the live processes that carry one of `launch_ids` in their environment."""
    found: dict[str, list[ProcessStat]] = {}
    if not launch_ids:
        return found
    marks = {f"{LAUNCH_ID_VARIABLE}={launch_id}".encode(): launch_id for launch_id in launch_ids}
    for folder in _PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile, or another user's
        launch_id = next((marks[item] for item in environ if item in marks), None)
        stat = read_stat(int(folder.name)) if launch_id else None
        if launch_id and stat is not None and stat.alive:
            found.setdefault(launch_id, []).append(stat)
    return found


def kill_remains(launch_ids: set[str]) -> None:
    """Kill every process that still carries one of `launch_ids`."""
    for stats in find_carriers(launch_ids).values():
        for stat in stats:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(stat.pid, signal.SIGKILL)


def describe_status(status: int) -> str:
    """Put a wait status into words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {member.value: member.name for member in signal.Signals}
        return f"killed by {names.get(number, f'signal {number}')}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"
