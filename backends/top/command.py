"""`doherty top`: which way the view is shown, and with which key it is asked for."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from backends.failure import StartError
from backends.printing import plain_json
from backends.top.feed import Admin, FeedError, check_url
from backends.top.flags import KEY_VARIABLE
from proxy.config import ConfigError
from proxy.contract.extras import install_command
from proxy.contract.view import View, encode_view
from proxy.secret_files import variable

KEY_BYTES_MAX = 4096
NEEDS_TEXTUAL = f"`doherty top` on a screen needs Textual: {install_command('top')} (or --once)"


def top(options: argparse.Namespace, environ: Mapping[str, str]) -> str | None:
    """Show the view; return what is to be printed, if anything.

    Raises `ConfigError` and `StartError`.
    """
    url = check_url(options.url)
    key = admin_key(options.api_key_file, environ)
    if options.json:
        return plain_json(encode_view(_fetched(url, key)).decode())
    if options.once or not _on_a_terminal():
        from backends.top.plain import as_text  # noqa: PLC0415  # not needed by the screen

        return as_text(_fetched(url, key), words=options.filter)
    try:
        from backends.top.app import run_app  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ConfigError(NEEDS_TEXTUAL) from error
    problem = run_app(url, key, interval_s=options.interval, words=options.filter)
    if problem:
        raise StartError(problem)
    return None


def admin_key(path: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the key of the file, else of the environment; it is never on the command line, where
    every process of the machine could read it. Raises `ConfigError`.
    """
    if path is None:
        return variable(environ, KEY_VARIABLE, secret=True) or None
    try:
        with Path(path).open("rb") as file:
            key = file.read(KEY_BYTES_MAX + 1).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from error
    if not key or len(key) > KEY_BYTES_MAX or not key.isprintable():
        raise ConfigError(f"--api-key-file {path}: expected one line with the admin key")
    return key


def _fetched(url: str, key: str | None) -> View:
    async def fetch() -> View:
        async with Admin(url, key) as admin:
            return await admin.fetch()

    try:
        return asyncio.run(fetch())
    except FeedError as error:
        raise StartError(f"{error}; name the admin listener with --url") from error


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
