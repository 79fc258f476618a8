"""What there is to complete: commands, their flags, and what each value may be.

Read off the parser, so that it is never behind. A value is one of a few words, a file, a folder, or
a name that a running manager knows; anything else is the user's to write.
"""

from __future__ import annotations

import argparse
import enum
import re
from collections.abc import Iterator
from typing import NamedTuple

from proxy.help_form import subparsers

_LISTED = re.compile(r"\{([^{}]+)\}")


class Kind(enum.Enum):
    """What a value is."""

    ANY = "any"
    WORD = "word"  # one of those listed
    FILE = "file"
    FOLDER = "folder"
    REPLICA = "replica"
    POOL = "pool"


class Value(NamedTuple):
    name: str
    kind: Kind
    words: tuple[str, ...] = ()
    many: bool = False


class Flag(NamedTuple):
    names: tuple[str, ...]
    text: str
    value: Value | None  # None: it takes none


class Node(NamedTuple):
    """One command: `path` is how it is called, without the program's name."""

    path: tuple[str, ...]
    flags: tuple[Flag, ...]
    values: tuple[Value, ...]  # that stand by themselves, in their order
    commands: tuple[tuple[str, str], ...]  # name and purpose


def nodes(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Node]:
    """Return the commands of a parser, those that have others before these."""
    flags, values = [], []
    for action in parser._actions:  # noqa: SLF001  # argparse tells of them in no other way
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            continue
        if action.option_strings:
            value = None if action.nargs == 0 else _value(action)
            flags.append(Flag(tuple(action.option_strings), _text(parser, action), value))
        else:
            values.append(_value(action))
    below = list(subparsers(parser))
    commands = tuple((name, purpose) for name, _, purpose in below)
    yield Node(path, tuple(flags), tuple(values), commands)
    for name, command, _ in below:
        yield from nodes(command, (*path, name))


def _value(action: argparse.Action) -> Value:
    name = str(action.metavar or action.dest)
    many = action.nargs in ("*", "+") or isinstance(action.nargs, int)
    if action.choices is not None:
        return Value(name, Kind.WORD, tuple(map(str, action.choices)), many)
    if (listed := _LISTED.fullmatch(name)) is not None:
        return Value(name, Kind.WORD, tuple(listed[1].split(",")), many)
    return Value(name, _kind(name, action), (), many)


def _kind(name: str, action: argparse.Action) -> Kind:
    if name in ("FILE", "CONFIG") or (name == "PATH" and action.dest.endswith("_path")):
        return Kind.FILE
    if name == "FOLDER":
        return Kind.FOLDER
    if name.startswith("REPLICA"):
        return Kind.REPLICA
    return Kind.POOL if name == "POOL" else Kind.ANY


def _text(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of a flag as one line, without its default."""
    form = parser._get_formatter()  # noqa: SLF001
    text = " ".join(form._expand_help(action).split()) if action.help else ""  # noqa: SLF001
    return re.split(r" ?[(\[]", text)[0].rstrip(";:, ")
