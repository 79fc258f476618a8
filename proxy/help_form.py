"""The form of every `--help`: what it is for, how it is called, flags in groups, examples.

In the order of a manual page, no wider than 80 columns, however wide the terminal: lines that long
are read, wider ones are searched. A usage that would list dozens of flags says `[OPTIONS]`, also
where it stands above an error.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import NamedTuple

WIDTH_MAX = 80
FLAGS_LISTED_MAX = 8  # in a usage; more are found below it


class Words(NamedTuple):
    """What a command's flags do not say."""

    examples: tuple[str, ...]
    about: str = ""  # beyond the line that says what it is for


class HelpForm(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDTH_MAX)
        super().__init__(prog, max_help_position=26, width=max(width, 40) - 2)


def dress(parser: argparse.ArgumentParser, words: Words, purpose: str = "") -> None:
    """Give a parser this form and these words."""
    parser.formatter_class = HelpForm
    parser.description = sentence(parser.description or purpose)
    if words.about:
        parser.description = f"{parser.description}\n\n{words.about}"
    parts = [parser.epilog] if parser.epilog else []
    parts.append("examples:\n" + "\n".join(f"  {line}" for line in words.examples))
    parser.epilog = "\n\n".join(parts)
    if parser.usage is None and len(_optionals(parser)) > FLAGS_LISTED_MAX:
        parser.usage = " ".join(("%(prog)s [OPTIONS]", *_positionals(parser)))


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line; exits with a message when it makes no sense."""
    options, rest = parser.parse_known_args(arguments)
    refuse(parser, arguments, rest)
    return options


def refuse(parser: argparse.ArgumentParser, arguments: Sequence[str], rest: Sequence[str]) -> None:
    """Exit with a message if anything is left; for a flag, name the one that was perhaps meant."""
    if not rest:
        return
    called = parser
    for word in arguments:
        called = next((one for name, one, _ in subparsers(called) if name == word), called)
    wrong = rest[0].partition("=")[0]
    known = [name for action in _optionals(called) for name in action.option_strings]
    near = get_close_matches(wrong, known, n=1) if wrong.startswith("-") else []
    meant = f"; did you mean {near[0]}?" if near else f"; `{called.prog} --help` lists what is"
    called.error(f"there is no {wrong}{meant}")


def subparsers(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Return the commands of a parser: name, parser, and what each is for."""
    for action in parser._actions:  # noqa: SLF001  # argparse tells of them in no other way
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            purposes = {one.dest: one.help or "" for one in action._choices_actions}  # noqa: SLF001
            for name, command in action.choices.items():
                yield name, command, purposes.get(name, "")


def sentence(purpose: str) -> str:
    """Return the line of a list as a sentence."""
    if not purpose or purpose.endswith("."):
        return purpose
    return f"{purpose[:1].upper()}{purpose[1:]}."


def _optionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions  # noqa: SLF001
        if action.option_strings and action.help != argparse.SUPPRESS
    ]


def _positionals(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:  # noqa: SLF001
        if action.option_strings or isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            continue
        name = str(action.metavar or action.dest)
        if action.nargs in ("?", "*"):
            yield f"[{name}{' ...' if action.nargs == '*' else ''}]"
        else:
            yield f"{name}{' ...' if action.nargs == '+' else ''}"
