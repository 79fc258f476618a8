"""Every `--help`: what it is for, examples that the command takes, in 80 columns."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from backends import cli
from backends.command_line import COMMANDS, whole
from backends.command_words import GROUPS, WORDS
from proxy.config import ProxyConfig
from proxy.flag_groups import FURTHER, group_of
from proxy.help_form import subparsers

CONFIG = """\
models: [{name: m, pools: [{engine: simulator, replicas: 1}]}]
proxy: {keys_path: keys.json}
tenants: [{name: acme}]
"""


@cache
def _parsers() -> dict[str, argparse.ArgumentParser]:
    def below(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, object]]:
        yield path, parser
        for name, command, _ in subparsers(parser):
            yield from below(f"{path} {name}".strip(), command)

    return dict(below("", whole()))  # type: ignore[arg-type]


PATHS = sorted(_parsers())
EXAMPLES = sorted({line for words in WORDS.values() for line in words.examples})


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("path", PATHS, ids=[path or "doherty" for path in PATHS])
def test_a_help_says_what_for_and_has_examples_and_is_80_columns_wide(path: str) -> None:
    text = _parsers()[path].format_help()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert lines[0].startswith(f"usage: doherty {path}".rstrip())
    assert re.search(r"\n\n[A-Z][^\n]+\.\n", text), "one sentence says what it is for"
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2
    assert all(f"doherty {path}".rstrip() in line for line in examples)
    for line in lines:
        assert "==SUPPRESS==" not in line
        assert "None" not in line


def test_the_first_help_lists_each_command_once_under_a_heading() -> None:
    text = _parsers()[""].format_help()
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS)
    for name, command in COMMANDS.items():
        assert text.count(f"\n  {name} ") == 1
        assert command.summary in text
    assert [title for title in GROUPS if f"\n{title}:\n" not in text] == []


def test_words_belong_to_commands() -> None:
    assert set(WORDS) <= set(PATHS)


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_taken_by_its_command(line: str) -> None:
    arguments = _arguments(line)
    root = _parsers()[""]
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    options, rest = root.parse_known_args(arguments)
    assert rest == []
    assert options is not None


def _arguments(line: str) -> list[str]:
    """Return what the shell would give the command: before a pipe, without what is redirected."""
    line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)
    line = next(part for part in line.split(" | ") if "doherty " in part)
    words = shlex.split(re.split(r" [<>] ", line)[0])
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    assert words[0] == "doherty"
    return words[1:]


RUNNABLE = [line for line in EXAMPLES if "doherty check" in line or "doherty completion" in line]


@pytest.mark.parametrize("line", RUNNABLE)
def test_an_example_that_needs_no_server_runs(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doherty.yaml").write_text(CONFIG)
    assert cli.main(_arguments(line)) == 0
    assert capsys.readouterr().out


def test_keys_are_made_listed_and_ended_as_the_examples_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doherty.yaml").write_text(CONFIG)
    monkeypatch.setenv("DOHERTY_CONFIG", "doherty.yaml")
    for line in (*WORDS["keys create"].examples, *WORDS["keys list"].examples):
        assert cli.main(_arguments(line)) == 0
    for line in (WORDS["keys rotate"].examples[0], WORDS["keys revoke"].examples[1]):
        assert cli.main(_arguments(line)) == 0
    assert cli.main(_arguments(WORDS["keys prune"].examples[0])) == 0
    assert "acme" in capsys.readouterr().out


def test_every_setting_of_the_proxy_is_in_a_group() -> None:
    """One that is new wants a line in `proxy/flag_groups.py`."""
    assert [name for name in ProxyConfig.__struct_fields__ if group_of(name) == FURTHER] == [
        "access"
    ]


def test_a_wrong_flag_is_one_line_under_a_short_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["up", "--prot", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "usage: doherty up [OPTIONS] [CONFIG]\n"
        "doherty up: error: there is no --prot; did you mean --port?\n"
    )
    with pytest.raises(SystemExit):
        cli.main(["keys", "create", "--tenant", "t", "--forever"])
    said = capsys.readouterr().err
    assert said.endswith("there is no --forever; `doherty keys create --help` lists what is\n")


def test_the_environment_beside_a_flag_is_the_one_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = _parsers()["proxy"].format_help()
    flat = " ".join(text.split())
    for name in ("host", "port", "max_payload_size", "verify_replica_tls"):
        assert f"[DOHERTY_{name.upper()}]" in flat
    for path, variable in (
        ("manager", "DOHERTY_MANAGER_PORT"),
        ("offline", "DOHERTY_STORE"),
        ("status", "DOHERTY_MANAGER_URL"),
        ("top", "DOHERTY_ADMIN_URL"),
        ("batch list", "DOHERTY_URL"),
        ("snapshot list", "DOHERTY_SNAPSHOT_DIR"),
    ):
        assert f"[{variable}]" in " ".join(_parsers()[path].format_help().split())
