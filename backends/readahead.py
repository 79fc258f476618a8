"""Fetches the files that a start really reads ahead of it, in the order of their use.

    python -m backends.readahead [--list FILE] [--record] [--until URL] -- COMMAND

Most of an engine's warm start is imports: thousands of small files and parts of large libraries,
read one after another, each waiting for the disk. What one start has read is recorded, once per
release (`snapshots/hook/reads` in the engine's own Python tells it), and the next start has it read
by many threads at once beside it: first what is imported first. What no start has touched, most of
the large libraries, is left alone. A list names each file's size and time of change, so that what
has been installed anew is not read by the list of what was there before.

As a program it does so for any command, and prints what that took.

Small files and parts of libraries go in two lanes: a library of hundreds of megabytes would
otherwise hold up what the interpreter waits for now.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.engines.dumps import HOOK
from backends.snapshots.tree import catches, members

SIGNAL = signal.SIGRTMIN + 5  # the hook tells what was read at it
VARIABLE = "DOHERTY_READS"
THREADS = (
    8  # of each lane; a disk of a cloud has queues that deep, and page cache is quicker anyhow
)
LISTS_MAX = 32  # kept; the oldest goes
FRESH_SHARE_MIN = 0.5  # of a list's files must be what they were, or it is made anew
TOLD_S_MAX = 10.0
LEFT_S_MAX = 3600.0  # what was told and not gathered by then, nobody will gather
POLL_S = 0.05
END_S_MAX = 20.0
_CHUNK_BYTES = 1 << 20
_FORM = 1

Part = tuple[int, int]


class Read(msgspec.Struct, frozen=True, array_like=True):
    """A file that was read, as it was then; without parts, the whole of it."""

    path: str
    size_bytes: int
    changed_ns: int
    parts: tuple[Part, ...] = ()


class Record(msgspec.Struct, frozen=True):
    """What a start has read."""

    form: int
    name: str  # whose: engine and release
    reads: tuple[Read, ...]

    @property
    def bytes_in_all(self) -> int:
        return sum(_bytes_of(read) for read in self.reads)


class Fetched(msgspec.Struct, frozen=True):
    """What came of fetching."""

    files: int = 0
    read_bytes: int = 0
    stale: int = 0  # files that are not what they were
    took_s: float = 0.0


class Lists:
    """The records of this machine, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, name: str) -> Record | None:
        return read_list(self._folder / f"{slug(name)}.json")

    def keep(self, record: Record) -> None:
        """Raises `OSError`."""
        write_list(self._folder / f"{slug(record.name)}.json", record)
        kept = sorted(self._folder.glob("*.json"), key=lambda found: found.stat().st_mtime_ns)
        for oldest in kept[:-LISTS_MAX]:
            oldest.unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        (self._folder / f"{slug(name)}.json").unlink(missing_ok=True)

    def told_at(self, name: str) -> str:
        """Return the value of `VARIABLE` for a start that is to be recorded. Raises `OSError`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        return str(self._folder / f"{slug(name)}.{time.time_ns():x}")

    def _sweep(self) -> None:
        """Remove what processes have told at their own end, when nobody asks any more."""
        for path in self._folder.iterdir():
            with suppress(OSError):
                if path.suffix != ".json" and time.time() - path.stat().st_mtime > LEFT_S_MAX:
                    path.unlink()


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def name_at(prefix: str) -> str:
    """Return whose start tells of itself in files of this prefix, as a slug."""
    return Path(prefix).name.rpartition(".")[0]


def read_list(path: Path) -> Record | None:
    """Return the record in a file; None when there is none, or one of another form."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if record.form == _FORM else None


def write_list(path: Path, record: Record) -> None:
    """Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(record))
    new.replace(path)


def record_start(name: str, prefix: str, pid: int) -> Record | None:
    """Ask the processes under `pid` what they have read; None when none of them tells."""
    asked = [member.pid for member in members(pid) if catches(member.pid, SIGNAL)]
    for one in asked:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(one, SIGNAL)
    give_up_s = time.monotonic() + TOLD_S_MAX
    while time.monotonic() < give_up_s:
        if all(Path(f"{prefix}.{one}").exists() for one in asked):
            break
        time.sleep(POLL_S)
    return gathered(name, prefix)


def gathered(name: str, prefix: str) -> Record | None:
    """Put together what processes have told in files of this prefix, and remove those."""
    base = Path(prefix)
    told = sorted(base.parent.glob(base.name + ".*"), key=lambda path: path.stat().st_mtime_ns)
    parts: dict[str, tuple[Part, ...]] = {}
    for path in told:
        with suppress(OSError, msgspec.MsgspecError):
            for line in path.read_bytes().splitlines():
                file, touched = msgspec.json.decode(line, type=tuple[str, tuple[Part, ...]])
                parts[file] = united(parts.get(file, ()) + touched)
        path.unlink(missing_ok=True)
    reads = tuple(read for file, touched in parts.items() if (read := _as_it_is(file, touched)))
    return Record(_FORM, name, reads) if reads else None


def united(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return parts in order, without overlaps."""
    found: list[Part] = []
    for start, length in sorted(parts):
        if found and start <= sum(found[-1]):
            found[-1] = (found[-1][0], max(sum(found[-1]), start + length) - found[-1][0])
        else:
            found.append((start, length))
    return tuple(found)


def _as_it_is(file: str, parts: tuple[Part, ...]) -> Read | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return Read(file, status.st_size, status.st_mtime_ns, parts)


def fetch(reads: Sequence[Read], stop: threading.Event | None = None) -> Fetched:
    """Read into the page cache what `reads` name, in their order; return when it is there."""
    begun_s = time.monotonic()
    lanes = [[read for read in reads if not read.parts], [read for read in reads if read.parts]]
    lane_of = [_Lane(lane, stop or threading.Event()) for lane in lanes]
    threads = [threading.Thread(target=lane.run, daemon=True) for lane in lane_of for _ in
               range(THREADS)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Fetched(
        files=sum(lane.files for lane in lane_of),
        read_bytes=sum(lane.read_bytes for lane in lane_of),
        stale=sum(lane.stale for lane in lane_of),
        took_s=time.monotonic() - begun_s,
    )


class _Lane:
    """Files that several threads take from the front."""

    def __init__(self, reads: Iterable[Read], stop: threading.Event) -> None:
        self._left = iter(reads)
        self._stop = stop
        self._lock = threading.Lock()
        self.files = self.read_bytes = self.stale = 0

    def run(self) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        while not self._stop.is_set():
            with self._lock:
                read = next(self._left, None)
            if read is None:
                return
            count = _fetch_one(read, memoryview(buffer))
            with self._lock:
                self.files += count is not None
                self.stale += count is None
                self.read_bytes += count or 0


def _fetch_one(read: Read, buffer: memoryview) -> int | None:
    """Read one file's parts; None when it is not what it was."""
    try:
        fd = os.open(read.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (read.size_bytes, read.changed_ns):
            return None
        parts = read.parts or ((0, read.size_bytes),)
        return sum(_read_part(fd, start, length, buffer) for start, length in parts)
    except OSError:
        return None
    finally:
        os.close(fd)


def _read_part(fd: int, start: int, length: int, buffer: memoryview) -> int:
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_WILLNEED)
    end, size = start + length, len(buffer)
    return sum(os.preadv(fd, [buffer[: min(size, end - at)]], at) for at in range(start, end, size))


def _bytes_of(read: Read) -> int:
    return sum(length for _, length in read.parts) if read.parts else read.size_bytes


# --- as a program -----------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="backends.readahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", type=Path, metavar="FILE", help="fetch what it names; with --record, write it")
    add("--record", action="store_true", help="note what the command reads")
    add("--until", default="", metavar="URL", help="it has started when this answers 200; ends it")
    add("--limit-s", type=float, default=600.0)
    add("command", nargs="+", metavar="-- COMMAND")
    options = parser.parse_args(argv)
    if options.record and options.list is None:
        parser.error("--record needs --list, the file to write")
    try:
        told = _start(options)
    except (OSError, TimeoutError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"readahead: {error}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    return 0


def _start(options: argparse.Namespace) -> dict[str, float]:
    """Run the command to its end, or until it has started; return what that took."""
    prefix = f"{options.list}.{os.getpid()}"
    env = {**os.environ, VARIABLE: prefix} if options.record else dict(os.environ)
    path = [HOOK, env["PYTHONPATH"]] if env.get("PYTHONPATH") else [HOOK]
    env["PYTHONPATH"] = os.pathsep.join(path)
    record = None if options.record or options.list is None else read_list(options.list)
    begun_s = time.monotonic()
    fetching: list[Fetched] = []
    thread = threading.Thread(target=lambda: fetching.append(fetch(record.reads if record else ())))
    thread.start()
    with subprocess.Popen(  # noqa: S603  # the user's own command
        options.command, env=env, stdout=2, start_new_session=True
    ) as process:
        try:
            _until_started(process, options.until, options.limit_s)
            took_s = time.monotonic() - begun_s
            found = record_start("", prefix, process.pid) if options.record else None
        finally:
            _end(process)
    thread.join()
    if options.record:
        if found is None or not found.reads:
            raise OSError("nothing told what it read; is the command a Python?")
        write_list(options.list, found)
    read_blocks = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
    return {
        "took_s": round(took_s, 3),
        "read_by_itself_mib": read_blocks >> 11,  # of 512 octets, getrusage(2)
        "fetched_mib": sum(each.read_bytes for each in fetching) >> 20,
        "fetched_in_s": round(sum(each.took_s for each in fetching), 3),
        "files": len(found.reads) if found else sum(each.files for each in fetching),
        "listed_mib": (found or record or Record(_FORM, "", ())).bytes_in_all >> 20,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S_MAX)


def _until_started(process: subprocess.Popen[bytes], url: str, limit_s: float) -> None:
    give_up_s = time.monotonic() + limit_s
    while process.poll() is None:
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"it had not started in {limit_s:g} s")
        if url and _answers(url):
            return
        time.sleep(POLL_S / 5)
    if process.returncode or url:
        raise OSError(f"the command ended with {process.returncode}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310  # the user's own
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
