"""One JSON line for each event, to standard error. Events are words, details are fields.

Fields are chosen by the caller from a closed set of harmless things (ids, ports, states, reasons);
environments, argument lists and bodies are never logged, because keys live in them.

A line that cannot be written is lost, and nothing else happens: its reader may have gone or its
disk be full, and whoever tells an event has more to do than to tell it. The manager tells of an
engine that it has just started. Only msgspec is needed, because engine workers log from inside an
engine's own Python.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

import msgspec

_FIELD_CHARACTERS_MAX = 2_000


class Log:
    """A stream of events."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def tell(self, event: str, **fields: object) -> None:
        self._write("info", event, fields)

    def caution(self, event: str, **fields: object) -> None:
        self._write("warning", event, fields)

    def fault(self, event: str, **fields: object) -> None:
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        clipped = {
            k: v[:_FIELD_CHARACTERS_MAX] if isinstance(v, str) else v for k, v in fields.items()
        }
        record = {"at": at, "level": level, "event": event, **clipped}
        line = msgspec.json.encode(record, enc_hook=str)
        stream = self._stream or sys.stderr
        try:
            stream.write(line.decode() + "\n")
            stream.flush()
        except BrokenPipeError:
            if stream is sys.stderr:
                _divert_stderr()
        except (OSError, ValueError, AttributeError):  # closed, or None: closed at our start
            pass


def _divert_stderr() -> None:
    """Write to nowhere from now on: no reader comes back, and Python ends with 120 for the rest."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
