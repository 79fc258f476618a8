"""One JSON line for each event, to standard error. Events are words, details are fields.

Fields are chosen by the caller from a closed set of harmless things (ids, ports, states, reasons);
environments, argument lists and bodies are never logged, because keys live in them.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TextIO

import orjson

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
        line = orjson.dumps({"at": at, "level": level, "event": event, **clipped}, default=str)
        stream = self._stream or sys.stderr
        stream.write(line.decode() + "\n")
        stream.flush()
