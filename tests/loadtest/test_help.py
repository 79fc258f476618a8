"""Every `--help` of the load tests: what it is for, examples that the command takes, 80 columns."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache

import pytest

from loadtest.__main__ import _parser
from loadtest.examples import CALL, EXAMPLES, GROUPS, lines_of
from loadtest.help_form import subparsers


@cache
def _parsers() -> dict[str, argparse.ArgumentParser]:
    def below(
        path: str, parser: argparse.ArgumentParser
    ) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        yield path, parser
        for name, command, _ in subparsers(parser):
            yield from below(f"{path} {name}".strip(), command)

    return dict(below("", _parser()))


PATHS = sorted(_parsers())
LINES = [line for path in EXAMPLES for line in lines_of(path) if "COMMAND" not in line]


@pytest.mark.parametrize("path", PATHS, ids=[path or "loadtest" for path in PATHS])
def test_a_help_says_what_for_and_has_an_example_and_is_80_columns_wide(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = _parsers()[path].format_help()
    assert max(map(len, text.splitlines())) <= 80, max(text.splitlines(), key=len)
    assert text.startswith(f"usage: {CALL} {path}".rstrip())
    examples = text.partition("\nexamples:\n")[2].replace("\\\n", "").split("\n")
    whole = [" ".join(line.split()) for line in examples if line.strip()]
    assert whole
    assert whole == [" ".join(line.split()) for line in lines_of(path)]


def test_a_long_command_in_a_text_is_broken_as_a_shell_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = _parsers()["policies"].format_help()
    command = re.search(r"( +python -m loadtest policies conversation --pol.*(?:\\\n.*)+)", text)
    assert command is not None
    assert max(map(len, text.splitlines())) <= 60
    joined = command[1].replace("\\\n", "").split()
    assert joined[-2:] == ["--load", "0.9"]


def test_each_command_is_listed_once_under_a_heading() -> None:
    text = _parsers()[""].format_help()
    commands = [name for name, _, _ in subparsers(_parsers()[""])]
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(commands)
    assert [name for name in commands if text.count(f"\n  {name} ") != 1] == []
    assert set(EXAMPLES) == set(PATHS)


@pytest.mark.parametrize("line", LINES)
def test_an_example_is_taken_by_its_command(line: str) -> None:
    assert _parsers()[""].parse_args(shlex.split(line)[3:]).command
