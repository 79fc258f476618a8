"""What an engine said of its end: the one line of its log that tells why.

An engine dies loudly. The cause stands in the middle of the noise: vLLM's core prints it and dies,
the server that waited for the core prints another traceback that says nothing, and SGLang's
launcher adds that a child sent it a signal. So a line is chosen by what it is, not by where it
stands:

1. what is known to end engines (`_KNOWN`): memory, ports, kernels, drivers; it comes with a remedy;
2. the last exception, error of a command line, or crash;
3. the last line that was logged as an error;
4. otherwise the last lines.

What only reports the end of another process (`_ECHO`) counts as nothing. Among lines of one kind
the last one tells, for errors before it were survived; of what is known the first, because a rank
that runs out of memory takes the others with it. Only what this life has written is looked at: the
log goes on over restarts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

READ_BYTES_MAX = 256 * 1024  # ranks print their tracebacks one after another
WORDS_CHARACTERS_MAX = 400
TAIL_LINES = 3

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LEVELS = r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)"
_PREFIX = re.compile(
    r"\((?:\w+)(?: pid=\d+)?\) ?"  # vLLM: (EngineCore_DP0 pid=17)
    rf"|{_LEVELS} \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] ?)?"  # ERROR 11-22 18:20:44 [core.py:8]
    r"|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]*\] ?"  # SGLang: [2026-11-22 18:20:44 TP0]
    r"|\[rank\d+\]: ?"  # torch, of a rank
    rf"|{_LEVELS}: {{1,8}}"  # uvicorn: ERROR:    text
)
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: .*)?$")
_USAGE = re.compile(r"[\w ./-]{1,60}: error: .")
_CRASH = re.compile(r"Fatal Python error: |!+ Segfault encountered|Killed$|Aborted|Bus error")
_LOGGED = re.compile(r"\b(?:ERROR|CRITICAL|FATAL)\b|Subprocess \S+ .*crashed with exit code")
_FRAME = re.compile(r'\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_NO_MESSAGE = re.compile(r"[\w.]+$")
_CONTINUES = re.compile(r"\d+ validation errors? for \w+$|:$")  # pydantic tells in the lines below

# What only says that something else has ended.
_ECHO = re.compile(
    r"Engine core initialization failed"
    r"|WorkerProc initialization failed"
    r"|EngineDeadError|EngineCore encountered an issue"
    r"|[Ss]ee (?:stack trace|root cause)"
    r"|sigquit from a child|SIGQUIT received|scheduler died|died unexpectedly"
    r"|before crash diagnostics"
    r"|Connection (?:closed|reset) by peer|Broken pipe|EOFError|ChildProcessError"
    r"|SystemExit|KeyboardInterrupt|CancelledError"
    r"|destroy_process_group|resource_tracker"
)
_MEMORY = "give it more GPUs, a smaller context or batch, or smaller weights"
_KNOWN = tuple(
    (re.compile(pattern), remedy)
    for pattern, remedy in (
        (
            r"Free memory on device .* less than desired",
            "another process holds memory of the card (nvidia-smi), or lower "
            "--gpu-memory-utilization",
        ),
        (r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory", _MEMORY),
        (
            r"No available memory for the cache blocks|Not enough memory\. Please try to increase",
            f"raise --gpu-memory-utilization (SGLang: --mem-fraction-static), or {_MEMORY}",
        ),
        (r"KV cache is needed, which is larger than", "lower --max-model-len, or " + _MEMORY),
        (
            r"[Aa]ddress already in use|error while attempting to bind on address",
            "somebody else listens there; the next start takes another port",
        ),
        (
            r"no kernel image is available|CUDA driver version is insufficient"
            r"|driver on your system is too old|Driver/library version mismatch",
            "the engine's build of torch does not fit this card or its driver",
        ),
        (
            r"No CUDA GPUs are available|no NVIDIA driver|device-side .*not found",
            "look at nvidia-smi",
        ),
        (r"No space left on device", "free some disk, or enlarge /dev/shm"),
    )
)


def last_words(
    path: Path, lines_max: int = 1, *, since_bytes: int = 0, hide: Sequence[str] = ()
) -> str:
    """Return why the engine that wrote `path` ended, and then up to `lines_max` lines in all.

    With `lines_max` 0 only what tells of an end, else the last lines where nothing does.
    `since_bytes` is the length of the log when its life began; what is in `hide` is not shown.
    """
    words = words_in(_end_of(path, since_bytes), lines_max)
    for secret in hide:
        words = words.replace(secret, "***")
    return words


def words_in(text: str, lines_max: int = 1) -> str:
    """Return the telling line of a log, with a remedy where one is known, and its last lines."""
    raw = [_ANSI.sub("", line).rstrip() for line in text.splitlines()]
    lines = [_bare(line) for line in raw]
    cause = _known(lines) or _last_end(lines) or _last_logged(raw, lines)
    said = [line.strip() for line in lines if line.strip() and not _ECHO.search(line)]
    if not cause:
        if not lines_max:
            return ""
        return " | ".join(_clip(line) for line in said[-max(lines_max, TAIL_LINES) :])
    tail = said[-(lines_max - 1) :] if lines_max > 1 else []
    return "\n".join([cause, *map(_clip, tail)])


def _known(lines: Sequence[str]) -> str:
    for index, line in enumerate(lines):
        if line[:1].isspace() or not (_is_end(line) or _is_bind(line)):
            continue
        for pattern, remedy in _KNOWN:
            if pattern.search(line):
                return f"{_told(lines, index)} ({remedy})"
    return ""


def _last_end(lines: Sequence[str]) -> str:
    for index in range(len(lines) - 1, -1, -1):
        if _is_end(lines[index]) and not _ECHO.search(lines[index]):
            return _told(lines, index)
    return ""


def _last_logged(raw: Sequence[str], lines: Sequence[str]) -> str:
    for before, line in zip(reversed(raw), reversed(lines), strict=True):
        logged = _LOGGED.search(before) and not line[:1].isspace()
        if logged and line.strip() and not _ECHO.search(line):
            return _clip(line)
    return ""


def _is_end(line: str) -> bool:
    return bool(_EXCEPTION.match(line) or _USAGE.match(line) or _CRASH.match(line))


def _is_bind(line: str) -> bool:
    return line.startswith("[Errno")


def _told(lines: Sequence[str], index: int) -> str:
    """Return a line with what it lacks: the message below it, or the place above it."""
    line = lines[index]
    if _CONTINUES.search(line):
        below = next((more.strip() for more in lines[index + 1 :] if more.strip()), "")
        return _clip(f"{line}: {below}" if below else line)
    if _NO_MESSAGE.match(line):
        frames = (_FRAME.match(above) for above in reversed(lines[:index]))
        frame = next(filter(None, frames), None)
        if frame is not None:
            place = f"{frame['file'].rpartition('/')[2]}:{frame['line']} {frame['name']}"
            return _clip(f"{line} in {place}")
    return _clip(line)


def _bare(line: str) -> str:
    """Take off what each log line begins with; the indentation of a traceback stays."""
    while (prefix := _PREFIX.match(line)) is not None:
        line = line[prefix.end() :]
    return line


def _clip(line: str) -> str:
    line = line.strip()
    return line if len(line) <= WORDS_CHARACTERS_MAX else line[: WORDS_CHARACTERS_MAX - 1] + "…"


def _end_of(path: Path, since_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = since_bytes if since_bytes <= size else 0  # it was cut meanwhile
            file.seek(max(start, size - READ_BYTES_MAX))
            return file.read(READ_BYTES_MAX).decode("utf-8", "backslashreplace")
    except OSError:
        return ""
