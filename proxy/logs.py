"""Events on standard error, one line each: time, level, where, what; or the same as JSON.

Names in a message are what managers, engines and clients chose. A line end in one would begin a
line that nobody wrote, and a terminal would carry out an escape sequence: both are written as in a
literal of Python.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson
from typing_extensions import override


class _Lines(logging.Formatter):
    """One line for a message; a trace of a fault follows in lines of its own."""

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        if not record.message.isprintable():
            record.message = "".join(
                letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                for letter in record.message
            )
        return super().formatMessage(record)


class _JsonLines(logging.Formatter):
    """One JSON object a line, whatever is in a message: a trace of a fault is within its field."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "at": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "event": record.getMessage(),
        }
        if record.exc_info:
            line["fault"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def set_up_logging(level: str, *, as_json: bool = False) -> None:
    logging.basicConfig(level=level.upper(), force=True)
    form = _Lines("%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s")
    logging.getLogger().handlers[0].setFormatter(_JsonLines() if as_json else form)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
