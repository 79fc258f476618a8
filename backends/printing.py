"""What commands print: texts in which engines, managers and clients chose some of the words.

A terminal carries out escape sequences, those of C1 (U+0080 to U+009F, ECMA-48 §5.3) as well, and
turns the line round at U+202E. So what moves a cursor is made visible before it is printed, in
errors too; line ends and tabs stay.
"""

from __future__ import annotations

import json
import os
import sys

from backends.failure import StartError

_KEPT = frozenset("\n\t")


def plain(text: str) -> str:
    """Return `text` with a replacement character for each that is neither shown nor a space."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in _KEPT else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def plain_json(text: str) -> str:
    """Return the same JSON, those characters by their numbers (RFC 8259 §7)."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _numbered(letter) for letter in text)


def _numbered(letter: str) -> str:
    if letter in "\n\t\r\x7f":  # between values, or what json leaves as it is
        return "\\u007f" if letter == "\x7f" else letter
    return json.dumps(letter)[1:-1]


def put(text: str) -> None:
    """Print it now. Raises `StartError`; a pipe that nobody reads is the caller's affair."""
    if sys.stdout is None:  # it was closed before we began
        raise StartError("standard output is closed; nothing was printed")
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence()
        raise StartError(f"standard output cannot be written: {error.strerror}") from error


def silence() -> None:
    """Have what is still unwritten go nowhere: Python would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
