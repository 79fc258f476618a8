"""Every command that a document shows is one: the real command lines read it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from backends.command_line import COMMANDS, whole
from backends.simulator.flags import parse_flags
from loadtest.__main__ import _parser as loadtest_parser
from proxy import flags

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("deploy/**/*.md"), *ROOT.glob("loadtest/**/*.md")]
)
GUIDES = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # which names parts of them
_SHELL = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_BEGINS = re.compile(
    r"(?:^(?:sudo (?:-u \w+ )?)?(?:\w+=\S* )*(?:\S*bin/)?|\$\()(doherty|python3? -m loadtest) (.*)$"
)
_OPERATOR = re.compile(r"^(\||\|\||&|&&|;|\d?[<>].*)$")
_INLINE = re.compile(r"`doherty ([a-z]+)[^`]*`")
PARSER, LOADTEST = whole(), loadtest_parser()


def _lines(text: str) -> list[str]:
    """Return the lines of shell in a document: fenced as such, or indented by four blanks."""
    fenced = "".join(_SHELL.findall(text))
    indented = re.findall(r"^    (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return re.sub(r"\\\n\s*", "", fenced + "\n".join(indented) + "\n").split("\n")


def _commands(text: str) -> list[tuple[str, list[str]]]:
    found = []
    for line in _lines(text):
        begins = _BEGINS.search(line)
        if begins is None or line.lstrip().startswith("#"):
            continue
        words: list[str] = []
        for word in shlex.split(begins[2].partition(")")[0] if "$(" in line else begins[2], True):
            if _OPERATOR.match(word):
                break
            words.append(word)
        found.append((begins[1].rpartition(" ")[2], words))
    return found


SHOWN = [
    (str(path.relative_to(ROOT)), program, words)
    for path in DOCUMENTS
    for program, words in _commands(path.read_text(encoding="utf-8"))
]


def _read(program: str, words: list[str]) -> None:
    """Have the real command line read the words; it ends the test where it would end the run."""
    if program == "loadtest":
        LOADTEST.parse_args(words)
    elif words[0] == "proxy":
        flags.parse(words[1:], {})
    elif words[0] == "simulator":
        parse_flags(words[1:])
    elif words[0] == "compile":
        assert set(words[1:]) <= {"--force"}
    else:
        PARSER.parse_args(words)


def test_commands_are_found() -> None:
    assert len(SHOWN) > 60
    assert {program for _, program, _ in SHOWN} == {"doherty", "loadtest"}


@pytest.mark.parametrize(("where", "program", "words"), SHOWN, ids=lambda value: str(value)[:60])
def test_a_shown_command_is_one(where: str, program: str, words: list[str]) -> None:
    try:
        _read(program, words)
    except SystemExit as ended:
        if ended.code != 0:  # `--help` and `--version` end so, too
            pytest.fail(f"{where}: {program} {' '.join(words)}: see the message above")
    for word in words:
        if word.startswith(("deploy/", "loadtest/")):
            assert (ROOT / word).exists(), f"{where}: {word}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_whole_command_in_a_sentence_is_one(path: Path) -> None:
    """Those with flags and without placeholders (`ID`, `…`) are whole."""
    for line in re.findall(r"`((?:doherty|python -m loadtest) [^`]+)`", path.read_text("utf-8")):
        if " --" in line and not re.search(r"…|(?<![\w/.-])[A-Z]+\b(?!/)", line):
            for program, words in _commands("    " + line.replace("\n", " ")):
                test_a_shown_command_is_one(str(path), program, words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_subcommand_that_is_named_in_a_sentence_is_one(path: Path) -> None:
    named = set(_INLINE.findall(path.read_text(encoding="utf-8")))
    assert named - COMMANDS.keys() == set()


def test_a_command_that_is_none_is_noticed() -> None:
    (program, words), *_ = _commands("    sudo X=1 doherty sclae demo  # how many\n")
    assert (program, words) == ("doherty", ["sclae", "demo"])
    with pytest.raises(SystemExit):
        _read(program, words)
