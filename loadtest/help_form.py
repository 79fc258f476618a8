"""The form of every `--help`: in 80 columns, flags with their words, examples at the end."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator

from typing_extensions import override

from loadtest.examples import CALL, GROUPS, lines_of

WIDTH_MAX = 80
FLAGS_LISTED_MAX = 8  # in a usage; more are found below it
_HANGING = re.compile(r"( *\* \S+ {2,}| *(?:\* )?)")  # what stands before the words of a line


class HelpForm(argparse.HelpFormatter):
    """Breaks paragraphs anew; what is indented, a list or a command, keeps its lines."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDTH_MAX)
        super().__init__(prog, max_help_position=26, width=max(width, 40) - 2)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [part.splitlines() for part in text.strip("\n").split("\n\n")]
        return "\n\n".join("\n".join(_broken(part, width)) for part in parts)


class RootParser(argparse.ArgumentParser):
    """Lists the commands in groups."""

    @override
    def format_help(self) -> str:
        form = HelpForm(self.prog)
        form.add_usage(self.usage, [], ())
        form.add_text(self.description)
        listed = {name: purpose for name, _, purpose in subparsers(self)}
        named = [name for names in GROUPS.values() for name in names]
        groups = GROUPS | {"further": tuple(name for name in listed if name not in named)}
        for title, names in groups.items():
            if names:
                lines = [line for name in names for line in _listed(name, listed[name])]
                form.add_text("\n".join((f"{title}:", *lines)))
        form.add_text(self.epilog)
        return form.format_help()


def dress(parser: argparse.ArgumentParser, path: str = "") -> None:
    """Give a parser and those of its commands this form, and their examples."""
    parser.formatter_class = HelpForm
    if lines := lines_of(path):
        parser.epilog = "\n".join(("examples:", *(f"  {line}" for line in lines)))
    flags = [action for action in parser._actions if action.option_strings]  # noqa: SLF001
    if parser.usage is None and len(flags) > FLAGS_LISTED_MAX:
        form = HelpForm("")
        others = [one for one in parser._actions if not one.option_strings]  # noqa: SLF001
        form.add_usage(None, others, (), "")
        parser.usage = " ".join(f"%(prog)s [OPTIONS] {form.format_help()}".split())
    for name, command, _ in subparsers(parser):
        dress(command, f"{path} {name}".strip())


def subparsers(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Return the commands of a parser: name, parser, and what each is for."""
    for action in parser._actions:  # noqa: SLF001  # argparse tells of them in no other way
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            purposes = {one.dest: one.help or "" for one in action._choices_actions}  # noqa: SLF001
            for name, command in action.choices.items():
                yield name, command, purposes.get(name, "")


def _listed(name: str, purpose: str) -> list[str]:
    return textwrap.wrap(
        purpose, WIDTH_MAX - 2, initial_indent=f"  {name:<17}", subsequent_indent=" " * 19
    )


def _broken(lines: list[str], width: int) -> Iterator[str]:
    """Break the lines of one paragraph to a width; plain ones flow together."""
    if all(line[:1] not in (" ", "*") for line in lines) and not _titled(lines):
        yield from textwrap.wrap(" ".join(lines), width)
        return
    for line in lines:
        before = _HANGING.match(line)
        begun = before[1] if before else ""
        rest = line[len(begun) :]
        if rest.startswith(CALL):
            yield from _command(begun, rest, width)
            continue
        wrapped = textwrap.wrap(
            rest,
            width,
            initial_indent=begun,
            subsequent_indent=" " * len(begun),
            break_on_hyphens=False,
        )
        yield from wrapped or [""]


def _command(begun: str, text: str, width: int) -> Iterator[str]:
    """Break a command as a shell takes it."""
    further = begun + "    "
    words, line = text.split(" "), begun
    for at, word in enumerate(words):
        longer = line + word if line == begun else f"{line} {word}"
        if len(longer) + (0 if at == len(words) - 1 else 2) > width and line not in (
            begun,
            further,
        ):
            yield f"{line} \\"
            line = further + word
        else:
            line = longer
    yield line


def _titled(lines: list[str]) -> bool:
    """Say whether the first line is a heading of those below it."""
    return len(lines) > 1 and lines[0].endswith(":") and lines[1].startswith(" ")
