"""Completion in the shells themselves: what they offer after a few letters."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from backends.command_line import whole
from backends.completion.shells import script
from backends.completion.tree import Kind, nodes
from tests.fakes.terminal import Terminal

# What is typed, what is offered among others, what is not.
CASES = [
    ("a command", "doherty sim", {"simulator"}, {"up", "status"}),
    ("all commands", "doherty ", {"up", "keys", "top"}, {"--host", "create"}),
    ("a command of a command", "doherty keys r", {"rotate", "revoke"}, {"create"}),
    ("a flag", "doherty top --o", {"--once"}, {"--offline"}),
    ("a flag of a command of a command", "doherty keys create --te", {"--tenant"}, {"--all"}),
    ("a flag of the proxy", "doherty proxy --worker-u", {"--worker-urls"}, set()),
    ("a choice", "doherty check --class off", {"offline"}, {"online"}),
    ("a choice that stands by itself", "doherty completion f", {"fish"}, {"bash"}),
    ("a choice of the configuration's", "doherty up --policy le", {"least_load"}, {"prefix"}),
    (
        "after a flag's value that looks like a command",
        "doherty manager --run-dir up --sw",
        {"--sweep"},
        {"--workers"},
    ),
    ("a file", "doherty check dohe", {"doherty.yaml"}, {"dohefolder.txt"}),
    ("a folder", "doherty manager --run-dir ru", {"runs"}, {"rules.txt"}),
]
IDS = [case[0] for case in CASES]


@cache
def _script(shell: str) -> str:
    return script(shell, whole())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("doherty.yaml", "rules.txt"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_every_command_and_flag_is_in_the_tree() -> None:
    tree = {" ".join(node.path): node for node in nodes(whole())}
    assert {"", "up", "keys create", "batch submit", "snapshot prune", "simulator"} <= set(tree)
    flags = {name for flag in tree["proxy"].flags for name in flag.names}
    assert {"--host", "--takeover", "--no-verify-replica-tls", "-h"} <= flags
    assert tree["sleep"].values[0].kind is Kind.REPLICA
    assert tree["scale"].values[0].kind is Kind.POOL
    for name, node in tree.items():
        told = [flag.names for flag in node.flags if not flag.text]
        assert told == [], f"{name}: flags without a word of help"


@pytest.mark.parametrize(("typed", "offered", "others"), [c[1:] for c in CASES], ids=IDS)
def test_bash(typed: str, offered: set[str], others: set[str], folder: Path) -> None:
    words = typed.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    code = f"""{_script("bash")}
compopt() {{ :; }}  # it works in completions only
COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}
_doherty; printf '%s\\n' "${{COMPREPLY[@]}}\""""
    found = _lines([_shell("bash"), "--norc", "-c", code])
    assert offered <= found
    assert not others & found


@pytest.mark.parametrize(("typed", "offered", "others"), [c[1:] for c in CASES], ids=IDS)
def test_fish(typed: str, offered: set[str], others: set[str], folder: Path) -> None:
    fish = _shell("fish")
    (folder / "c.fish").write_text(_script("fish"))
    found = _lines([fish, "--no-config", "-c", f"source c.fish; complete -C '{typed}'"])
    found = {line.split("\t")[0].rstrip("/") for line in found}
    assert offered <= found
    assert not others & found


async def test_zsh(folder: Path) -> None:
    zsh = _shell("zsh")
    (folder / "c.zsh").write_text(_script("zsh"))
    async with Terminal(200, 50) as terminal:
        await terminal.until("ready> ")
        begin = (
            f"{zsh} -f\nPS1='zsh'\"> \"; autoload -U compinit; compinit -D -u; source c.zsh; "
            "zstyle ':completion:*' list-prompt ''; LISTMAX=1000; unsetopt automenu; echo be''gun\n"
        )
        at = terminal.type(begin)
        await terminal.until("begun", at)
        for what, typed, offered, others in CASES:
            at = terminal.type(f"{typed}\t\t")
            for word in offered:
                await terminal.until(word, at)
            told = terminal.text(at)
            assert not {word for word in others if f" {word} " in told}, f"{what}: {told}"
            terminal.type("\x15")  # the line is empty again


async def test_bash_at_a_prompt_completes_a_word_by_the_tab_key(folder: Path) -> None:
    (folder / "c.bash").write_text(_script("bash"))
    async with Terminal(200, 50) as terminal:
        await terminal.until("ready> ")
        at = terminal.type("exec bash --norc --noprofile\n")
        await terminal.until("ready> ", at)
        at = terminal.type("source c.bash\n")
        await terminal.until("ready> ", at + 16)
        at = terminal.type("doherty keys rev\t--ten\t")
        await terminal.until("doherty keys revoke --tenant", at)
        at = terminal.type("\x15doherty check --class=sem\t")
        await terminal.until("--class=semi-online", at)


def test_names_of_a_running_manager_are_offered(folder: Path) -> None:
    table = (
        "ID  STATE  ENGINE  URL  GPUS  RUNNING  WAITING  KV  RESTARTS  REASON\n"
        "demo-0  ready  simulator  http://h:1  -  0  0  0%  0  \n"
        "demo$(touch${IFS}taken)  ready  simulator  http://h:1  -  0  0  0%  0  \n"
        "demo-`touch${IFS}taken`  ready  simulator  http://h:1  -  0  0  0%  0  \n"
        "demo waits: a card that another pool of a higher class has is not free\n"
    )
    command = folder / "doherty"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{table}END\n")
    command.chmod(0o755)
    code = f"""{_script("bash")}
COMP_WORDS=(doherty wake d); COMP_CWORD=2
_doherty; printf '%s\\n' "${{COMPREPLY[@]}}\""""
    path = f"{folder}:{os.environ['PATH']}"
    assert _lines([_shell("bash"), "--norc", "-c", code], path) == {"demo-0"}
    assert not (folder / "taken").exists()  # a manager may be anybody's; its names run nothing


def _lines(command: list[str], path: str | None = None) -> set[str]:
    environment = {**os.environ, "PATH": path or os.environ["PATH"], "TERM": "dumb"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return set(said.stdout.splitlines())
