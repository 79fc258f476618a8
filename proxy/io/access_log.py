"""One JSON line a request, written by a thread, so that a slow disk or pipe delays nobody.

Lines wait in a bounded buffer; what does not fit is dropped and counted, never waited for. A line
holds no header, prompt, completion or key; what clients chose (path, id, model) is escaped by the
JSON encoder and was bounded before. Records of usage (`contract.usage`) are written the same way.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from proxy.config import ProxyConfig
from proxy.core import limits
from proxy.core.cost import Terms


def _plain(value: object) -> object:
    """Return what the encoder cannot write itself in its words; done by the thread."""
    assert isinstance(value, Terms)
    return value.as_dict()


_encoder = msgspec.json.Encoder(enc_hook=_plain)

FLUSH_INTERVAL_S = 0.2
WRITE_BYTES_MAX = 256 * limits.KIB
RECORDS_AT_ONCE = 256  # some 160 KiB of lines: in most cases one write


class AccessLog:
    """Appends lines to a file, to standard output ('-'), or nowhere ('off')."""

    def __init__(self, target: str) -> None:
        """Open the target. Raises `OSError` when it cannot be written."""
        self.dropped_total = 0
        self.enabled = target != "off"
        self._lines: deque[msgspec.Struct] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._writer: threading.Thread | None = None
        self._fd = -1
        self._write_bytes_max = WRITE_BYTES_MAX
        if self.enabled:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = (
                os.dup(sys.stdout.fileno()) if target == "-" else os.open(target, flags, 0o640)
            )
            if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                # Workers share the pipe: longer writes could be mixed within a line (POSIX, write).
                self._write_bytes_max = select.PIPE_BUF
            self._writer = threading.Thread(target=self._write, name="access-log", daemon=True)
            self._writer.start()

    def write(self, record: msgspec.Struct) -> None:
        """Queue one record; the thread picks it up within `FLUSH_INTERVAL_S`."""
        if len(self._lines) >= limits.ACCESS_LOG_LINES_MAX:
            self.dropped_total += 1
            return
        self._lines.append(record)

    def _write(self) -> None:
        while True:
            closing = self._closing
            records = [self._lines.popleft() for _ in range(len(self._lines))]
            for octets, count in _batches(records, self._write_bytes_max):
                if not self._write_all(octets):
                    self.dropped_total += count
            if closing:
                return
            self._wake.wait(FLUSH_INTERVAL_S)

    def _write_all(self, data: bytes) -> bool:
        view = memoryview(data)
        try:
            while view:
                written_bytes = os.write(self._fd, view)  # apart: mypyc evaluates a bound twice
                view = view[written_bytes:]
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Write what waits and stop. A writer stuck on a dead pipe is left behind."""
        if self._writer is not None:
            self._closing = True
            self._wake.set()
            self._writer.join(timeout=2.0)
            if not self._writer.is_alive():
                os.close(self._fd)
            self._writer = None
            self.enabled = False


def open_logs(config: ProxyConfig) -> tuple[AccessLog, AccessLog]:
    """Open the access log and that of usage. Raises `OSError`, and then none is open."""
    access_log = AccessLog(config.access_log)
    try:
        return access_log, AccessLog(config.usage_log)
    except OSError:
        access_log.close()
        raise


def close_all(logs: Iterable[AccessLog]) -> None:
    """Write what waits in each, and stop."""
    for log in logs:
        log.close()


def _batches(records: Sequence[msgspec.Struct], size_max: int) -> Iterator[tuple[bytes, int]]:
    """Yield whole lines and their number, at most `size_max` octets unless one line is longer."""
    for begin in range(0, len(records), RECORDS_AT_ONCE):
        some = records[begin : begin + RECORDS_AT_ONCE]
        octets = _encoder.encode_lines(some)
        if len(octets) <= size_max:
            yield octets, len(some)
            continue
        lines = octets.splitlines(keepends=True)
        start = size = 0
        for index, line in enumerate(lines):
            if size and size + len(line) > size_max:
                yield b"".join(lines[start:index]), index - start
                start, size = index, 0
            size += len(line)
        yield b"".join(lines[start:]), len(lines) - start
