"""How connections to the admin listener are kept: a deadline for heads, one line for what is none.

aiohttp serves the listener, and would wait an hour for the rest of a head that somebody has begun.
Here a connection on which nothing is being answered has as long as one that idles at the data path,
from its beginning or its last answer on: octets that come in do not lengthen it.

What is no request of HTTP is answered 400 and told in one line, since whoever finds the port can
send any number of them; aiohttp tells each with a trace of its parser. A fault of ours keeps its
trace.
"""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from typing_extensions import override

from proxy.core import limits

_WORDS_MAX = 200  # of what was wrong: it quotes what came


class _OneLine(logging.Filter):
    """Tells what a client did wrong without the trace of where that was seen."""

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            words = " ".join(error.message.split())[:_WORDS_MAX]
            sender = record.args[0] if isinstance(record.args, tuple) and record.args else None
            record.msg, record.args = "%s sent what is no request: %s", (sender, words)
            record.exc_info = record.exc_text = None
            if record.levelno > logging.WARNING:
                record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_log = logging.getLogger("doherty.admin")
_log.addFilter(_OneLine())


def admin_runner(
    app: web.Application, *, patience_s: float = limits.CLIENT_KEEP_ALIVE_S
) -> web.AppRunner:
    """Return what serves the admin application on sockets."""
    return web.AppRunner(
        app,
        access_log=None,
        logger=_log,
        keepalive_timeout=patience_s,
        lingering_time=limits.LINGER_S,
    )
