"""The flags of `doherty top`."""

from __future__ import annotations

import argparse
import os

URL, URL_VARIABLE = "http://127.0.0.1:8001", "DOHERTY_ADMIN_URL"
KEY_VARIABLE = "DOHERTY_ADMIN_API_KEY"
INTERVAL_S_MIN, INTERVAL_S_MAX = 1.0, 60.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("what to watch")
    where.add_argument(
        "--url",
        default=os.environ.get(URL_VARIABLE) or URL,
        help=f"admin listener of the proxy (default: {URL}) [{URL_VARIABLE}]",
    )
    where.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"file with the admin key [{KEY_VARIABLE}, or {KEY_VARIABLE}_FILE]",
    )
    where.add_argument("--filter", default="", metavar="WORDS", help="only rows with these words")
    how = parser.add_argument_group("how to show it")
    how.add_argument(
        "--interval",
        type=pause,
        default=INTERVAL_S_MIN,
        metavar="SECONDS",
        help="least time between two frames, 1 to 60 s (default: 1)",
    )
    ways = how.add_mutually_exclusive_group()
    ways.add_argument("--once", action="store_true", help="print all tables as text, and end")
    ways.add_argument("--json", action="store_true", help="print one view as JSON, and end")


def pause(text: str) -> float:
    """Return the seconds of `--interval`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not INTERVAL_S_MIN <= value <= INTERVAL_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 60")
    return value
