"""A cell: the namespaces that an engine runs in so that it can be dumped, and restored many times.

    cell run --state FILE --link NAME --host A --peer B -- COMMAND
    cell restore --state FILE --link NAME --host A --peer B --image FOLDER --criu COMMAND

A dumped process comes back under its old pid, on its old port, with its old files. So every copy
has process ids, a network, /dev/shm and a TMPDIR of its own, the same in each. The network is a
link to this machine and nothing else: nobody else can talk to the engine, which may listen on all
of the cell's addresses, and models must be on disk. /proc is its own, and io_uring is refused.

Two processes: the *keeper*, which the manager has started, watches and signals, stays outside; the
*init* is process 1 inside, collects the dead, and its end is the end of all within, by the kernel.
The keeper's end, however sudden, ends the init. A signal that asks for the end goes from the keeper
to the init to the engine's group, once. The cell ends when the engine ends, and by its status.

Engines inside start at pid 1000, so that CRIU, which is run inside as well, is never in the way of
an old pid. CRIU has monotonic clocks go on where they stood at the dump, in a time namespace: to
the engine no time has passed, and an image survives the machine's next boot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NoReturn

from backends.snapshots import kernel, netlink

LAUNCH_ID_VARIABLE = "DOHERTY_LAUNCH_ID"
FIRST_PID = 1000
SHM = "/dev/shm"  # noqa: S108  # the cell's own
TEMPORARY = f"{SHM}/tmp"  # noqa: S108
SHM_ARCHIVE = "shm.tar"
WORK = f"{SHM}/.cell"  # what this module keeps inside; never in an archive
INSIDE_LINK = "cell0"
ADDRESSES = "127.77.0.0/19"  # of all cells; a part of loopback that nobody else has a use for
FDS_MAX = 1 << 20
RESTORE_S_MAX = 600.0  # an image of 200 GB at the speed of a slow disk
FAILED_STATUS = 70  # the cell could not be made, or the image not be used
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_WATCHED = _ENDING | {signal.SIGCHLD}


class CellError(Exception):
    """The cell cannot be made; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Be a cell until the engine ends; return its exit status, or die by its signal."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    os.closerange(3, FDS_MAX)  # an engine has no part in what others left open
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    state = State(Path(options.state))
    try:
        init, status_read = _make_init(options, state)
    except (OSError, CellError) as error:
        return _fail(state, str(error))
    status = _keep(init, status_read)
    if status != FAILED_STATUS << 8:  # else the state says why, to whoever waits
        state.remove()
    if os.WIFSIGNALED(status):
        _die_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


class State:
    """What is told of a cell to the manager: a file that is replaced, never half written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeper = os.getpid()  # before there is an init, which sees other numbers

    def tell(self, **facts: object) -> None:
        beside = self._path.with_suffix(".new")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"keeper": self._keeper, **facts}, file)
        beside.replace(self._path)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def _parse(argv: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(prog="cell", allow_abbrev=False)
    parser.add_argument("role", choices=("run", "restore"))
    for flag in ("--state", "--link", "--host", "--peer"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--image")
    parser.add_argument("--criu")
    end = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    options.command = list(argv[end + 1 :])
    return options


def _fail(state: State, reason: str) -> int:
    """Say on the log and in the state why there is no cell."""
    sys.stderr.write(f"cell: {reason}\n")
    with contextlib.suppress(OSError):
        state.tell(state="failed", reason=reason)
    return FAILED_STATUS


# --- the keeper -----------------------------------------------------------------------------------


def _make_init(options: Any, state: State) -> tuple[int, int]:
    """Start the init; return its pid, and where it will say how the engine ended."""
    kernel.unshare(kernel.CLONE_NEWPID)
    inside_read, inside_write = os.pipe()  # the init: my network is there
    linked_read, linked_write = os.pipe()  # the keeper: you are linked
    status_read, status_write = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(linked_write)
        os.close(inside_read)
        os.close(status_read)
        _be_init(options, state, (inside_write, linked_read, status_write))
    os.close(inside_write)
    os.close(linked_read)
    os.close(status_write)
    try:
        _await(inside_read, "the namespaces could not be made; see above")
        _link(options, init)
        os.write(linked_write, b"\n")
    except BaseException:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
        raise
    os.close(inside_read)
    return init, status_read  # `linked_write` stays open as long as we live


def _await(pipe: int, otherwise: str) -> None:
    """Wait for a word; without one the other is gone. Raises `CellError`."""
    if not os.read(pipe, 1):
        raise CellError(otherwise)


def _link(options: Any, init: int) -> None:
    """Make the link, by a name that the kernel gives once, and our end of it."""
    # Without a link, the address is this machine's own loopback, on which others may listen.
    netlink.make_unreachable(IPv4Network(ADDRESSES))
    inside = os.open(f"/proc/{init}/ns/net", os.O_RDONLY)
    try:
        netlink.add_pair(options.link, INSIDE_LINK, inside)
    except FileExistsError:
        raise CellError(f"another cell has the link {options.link}") from None
    finally:
        os.close(inside)
    _address(options.link, options.peer, options.host)


def _address(link: str, own: str, other: str) -> None:
    """Give one end of a link its address, and the way to the other end.

    The addresses are loopback's, which no machine sends out or takes in by its network; between
    the two ends only they are let pass, by routes before those that keep loopback to itself.
    """
    Path(f"/proc/sys/net/ipv4/conf/{link}/route_localnet").write_text("1")
    with contextlib.suppress(OSError):  # there may be no IPv6 at all
        Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6").write_text("1")
    netlink.set_up(link)
    netlink.add_address(link, own)
    netlink.add_local_route(link, other, own)


def _keep(init: int, status_read: int) -> int:
    """Pass on what asks for the end; return the engine's wait status once the init is gone."""
    while True:
        number = signal.sigwait(_WATCHED)
        if number in _ENDING:
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, number)
            continue
        pid, status = os.waitpid(init, os.WNOHANG)
        if pid:
            told = os.read(status_read, 16)  # empty when the init itself was killed
            return int(told) if told else status


def _die_by(number: int) -> None:
    """End as the engine did, for whoever reads our status. A core would be of the wrong process."""
    import resource  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)


# --- the init -------------------------------------------------------------------------------------


def _be_init(options: Any, state: State, pipes: tuple[int, int, int]) -> NoReturn:
    """Be process 1 of the cell; the process ends here, whatever happens."""
    inside_write, linked_read, status_write = pipes
    status = FAILED_STATUS << 8
    try:
        os.setsid()
        kernel.die_with_parent()
        _furnish()
        _reopen_output()
        os.write(inside_write, b"\n")
        _await(linked_read, "the keeper is gone")
        netlink.set_up("lo")
        _address(INSIDE_LINK, options.host, options.peer)
        engine = _start(options.command) if options.role == "run" else _restore(options, state)
        state.tell(state="running", engine=engine)
        status = _reap_until(engine)
    except (OSError, CellError) as error:
        _fail(state, str(error))
    finally:
        os.write(status_write, str(status).encode())
        os._exit(0)


def _furnish() -> None:
    """Make what is the cell's own: mounts, /proc, shared memory, network, the next pid."""
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET)
    kernel.mount("none", "/", "none", kernel.MS_REC | kernel.MS_SLAVE)
    hard = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("proc", "/proc", "proc", hard | kernel.MS_NOEXEC)
    kernel.mount("shm", SHM, "tmpfs", hard, "mode=1777")
    os.mkdir(TEMPORARY, 0o700)
    os.mkdir(WORK, 0o700)


def _reopen_output() -> None:
    """Take the log through the cell's own mounts; CRIU does not know others. Raises `CellError`."""
    for fd in (1, 2):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if not name.startswith("/"):  # a pipe is of no mount
            continue
        log = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
        same = os.path.samestat(os.fstat(log), os.fstat(fd))
        if same:
            os.dup2(log, fd)
        os.close(log)
        if not same or os.isatty(fd):
            raise CellError(f"the output must go to a file or a pipe, not to {name}")


def _start(command: Sequence[str]) -> int:
    """Start the engine at the head of a session of its own; return its pid."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(FIRST_PID - 1))
    engine = os.fork()
    if engine:
        return engine
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        environ = {k: v for k, v in os.environ.items() if k != LAUNCH_ID_VARIABLE}
        kernel.refuse_io_uring()
        os.execvpe(command[0], list(command), environ | {"TMPDIR": TEMPORARY})  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"cell: {command[0]}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(127)


def _reap_until(engine: int) -> int:
    """Collect the dead and pass signals on until the engine has ended; return its wait status."""
    while True:
        number = signal.sigwait(_WATCHED)
        if number in _ENDING:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine, number)
            continue
        status = _reap(engine)
        if status is not None:
            return status


def _reap(engine: int) -> int | None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return FAILED_STATUS << 8
        if pid == engine:
            return status
        if pid == 0:
            return None


# --- restoring ------------------------------------------------------------------------------------


def _restore(options: Any, state: State) -> int:
    """Bring back what an image holds; return the pid of the engine.

    Nothing of it runs before every byte has been read and found whole: CRIU stops before it lets
    the processes go, and asks.
    """
    from backends.snapshots import whole  # noqa: PLC0415  # xxhash: only those that restore need it

    image = Path(options.image)
    lock = whole.use(image)
    dumped = json.loads((image / whole.MANIFEST).read_bytes())["cell"]
    verdict = Path(WORK, "verdict")
    os.mkfifo(verdict, 0o600)
    problem = whole.first_problem(image, big=False)
    if problem:
        raise CellError(f"damaged: {problem}")
    reader = _fork(lambda: whole.judge(image, verdict))
    if (image / SHM_ARCHIVE).exists():
        _unpack(image / SHM_ARCHIVE)
    state.tell(state="restoring")
    log = Path(WORK, "restore.log")
    try:
        restored = not subprocess.run(  # noqa: S603
            _criu_restore(options, dumped, log),
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"DOHERTY_VERDICT": str(verdict)},
            timeout=RESTORE_S_MAX,
        ).returncode
    except subprocess.TimeoutExpired:
        restored = False
    if not restored:
        with contextlib.suppress(OSError):
            os.kill(reader, signal.SIGKILL)
        raise CellError(_why(log, verdict))
    os.close(lock)
    shutil.rmtree(WORK, ignore_errors=True)
    return int(dumped["engine"])


def _unpack(archive: Path) -> None:
    """Fill the cell's shared memory. Raises `CellError`: a large one is not judged yet."""
    try:
        with tarfile.open(archive) as content:
            content.extractall(SHM, filter="fully_trusted")  # noqa: S202  # ours
    except tarfile.TarError as error:
        raise CellError(f"damaged: {SHM_ARCHIVE}: {error}") from error


def _criu_restore(options: Any, dumped: Any, log: Path) -> list[str]:
    inherited = [word for name in dumped["outputs"] for word in ("--inherit-fd", f"fd[1]:{name}")]
    return [
        *shlex.split(options.criu), "restore", "--restore-detached",
        "--images-dir", options.image, "--work-dir", WORK, "--log-file", log.name, "-v2",
        "--tcp-established", "--ext-unix-sk", "--file-locks", "--link-remap",
        "--manage-cgroups=ignore", "--action-script", str(Path(options.image, "script")),
        *inherited,
    ]  # fmt: skip


def _why(log: Path, verdict: Path) -> str:
    with contextlib.suppress(OSError):
        problem = verdict.with_suffix(".problem").read_text()
        return f"damaged: {problem}"
    with contextlib.suppress(OSError):
        lines = errors_in(log.read_text("utf-8", "replace"))
        if lines:
            return f"CRIU could not restore it: {' / '.join(lines[:3])}"
    return "CRIU could not restore it and did not say why"


def errors_in(log: str) -> list[str]:
    """Return the errors that CRIU tells of; that its own limit of files stays is none."""
    lines = log.splitlines()
    return [line for line in lines if "Error" in line and "RLIMIT_NOFILE" not in line]


def _fork(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
