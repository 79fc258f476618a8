"""Events on standard error, one line each: time, level, where, what; or the same as JSON."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson
from typing_extensions import override


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
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
        force=True,
    )
    if as_json:
        logging.getLogger().handlers[0].setFormatter(_JsonLines())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
