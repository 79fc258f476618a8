"""Whether an engine of some release would take the arguments that a pool gives it.

An engine that meets an unknown flag exits after the half minute that its imports take, and says so
somewhere in its log. The tables beside this module hold the flags of several releases, so that a
misspelt one, or one of another release, is refused at once and with the nearest name.

A release that was read is known exactly. Between two that were read a flag may have come or gone at
any point, so what either has is let pass. Before the first, a flag that came later is refused and
one that the table lacks may have gone; after the last, anything may have come: both only warn.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Final, NamedTuple

from backends.engines.base import FlagError
from backends.engines.release import UNKNOWN_RELEASE, Release, parse_release

_FLAG: Final = re.compile(r"--[A-Za-z]|-[A-Za-z]")
_OPTIMIZATION: Final = re.compile(r"-O=?[0-9a-z]*")
_CLOSE: Final = 0.6  # difflib's own default of what is close enough to be meant


class Flag(NamedTuple):
    """One spelling. `kind`: switch, either (with a --no- form), maybe (a value or none), value."""

    name: str
    kind: str
    since: Release
    until: Release | None
    stands_for: str  # the flag that it is an alias of, or its own name


class FlagTable(NamedTuple):
    """The flags of one engine, and the releases that they were read from."""

    engine: str
    releases: tuple[Release, ...]
    flags: Mapping[str, Flag]


class _Given(NamedTuple):
    """A flag as it was given, and its name in the table's spelling."""

    text: str
    name: str
    joined: bool  # its value follows an equals sign, or it names a key of a JSON value
    followed: bool  # what comes next is no flag


@functools.cache
def flag_table(engine: str) -> FlagTable:
    """Return the table that ships for `engine`."""
    text = resources.files("backends.engines").joinpath(f"{engine}.flags").read_text("utf-8")
    return parse_table(engine, text)


def parse_table(engine: str, text: str) -> FlagTable:
    """Read what `deploy/engine_flags.py` wrote."""
    heads = [line[2:] for line in text.splitlines() if line.startswith("#")]
    releases = tuple(parse_release(word) for word in heads[1].split())
    flags = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, kind, since, until, *same_as = line.split()
            last = None if until == "-" else parse_release(until)
            stands_for = same_as[0] if same_as else name
            flags[name] = Flag(name, kind, parse_release(since), last, stands_for)
    return FlagTable(engine, releases, flags)


def check_flags(table: FlagTable, args: Sequence[str], release: Release) -> tuple[str, ...]:
    """Return warnings about `args`. Raises `FlagError` for what an engine would not take."""
    warnings = []
    for given in _flags_of(table, args):
        warning = _check(table, given, release)
        if warning:
            warnings.append(warning)
    return tuple(dict.fromkeys(warnings))


def starts_flag(word: str) -> bool:
    """Say whether an argument is a flag; a negative number is none."""
    return _FLAG.match(word) is not None


def refuse(
    table: FlagTable, args: Sequence[str], refused: Mapping[str, str], release: Release
) -> None:
    """Raise `FlagError` for the first of `args` that is in `refused`, with the reason there.

    Cut short, too: argparse takes --hos for --host, and the last one wins.
    """
    for given in _flags_of(table, args):
        name = given.name
        if name not in table.flags and name not in refused:
            meant = _completions(table, name, release)
            name = meant[0] if len(meant) == 1 else name
        if name in refused:
            raise FlagError(f"{table.engine}: {given.text} cannot be an argument: {refused[name]}")


def check_name(engine: str, args: Sequence[str], model: str) -> None:
    """Raise `FlagError` when `args` rename the model to what clients do not ask for.

    The flag takes several names, and its last use wins.
    """
    names: list[str] | None = None
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag.replace("_", "-") != "--served-model-name":
            continue
        if equals:
            names = [value]
        else:
            rest = args[index + 1 :]
            end = next((i for i, word in enumerate(rest) if starts_flag(word)), len(rest))
            names = list(rest[:end])
    if names is not None and model not in names:
        raise FlagError(
            f"{engine}: --served-model-name {' '.join(names)} leaves out '{model}', by which the "
            "configuration offers it; add it"
        )


def check_range(engine: str, release: Release, oldest: Release, newest: Release) -> tuple[str, ...]:
    """Return a warning when `release` is none of those that are known here."""
    if release == UNKNOWN_RELEASE:
        return (f"{engine} does not say its release; taken for any of {oldest} to {newest}",)
    if release < oldest:
        return (f"{engine} {release} is older than {oldest}, the oldest that is known here",)
    if release > newest:
        return (f"{engine} {release} is newer than {newest}, the newest that is known here",)
    return ()


def _check(table: FlagTable, given: _Given, release: Release) -> str:
    flag = table.flags.get(given.name) or _negated(table, given.name)
    if flag is None:
        short = _completions(table, given.name, release)
        if len(short) == 1:
            return f"{given.text} is short for {short[0]}; write it in full, releases add flags"
        if short:
            raise FlagError(f"{_who(table, release)}: {given.text} may be {_either(short)}")
        if _may_have_others(table, release):
            hint = _hint(table, given.name, release)
            return f"{_who(table, release)}: {given.text} is not known here{hint}; let pass"
        raise FlagError(_unknown(table, given, release, None))
    if not available(table, flag, release):
        if flag.until is not None and release > table.releases[-1]:
            return f"{_who(table, release)}: {given.text} was gone in {table.releases[-1]}"
        raise FlagError(_unknown(table, given, release, flag))
    _check_value(table, given, flag, release)
    return ""


def _check_value(table: FlagTable, given: _Given, flag: Flag, release: Release) -> None:
    if flag.kind in ("switch", "either") and given.joined:
        raise FlagError(f"{_who(table, release)}: {given.text} takes no value")
    if flag.kind == "value" and not given.joined and not given.followed:
        raise FlagError(f"{_who(table, release)}: {given.text} needs a value")


def available(table: FlagTable, flag: Flag, release: Release) -> bool:
    """Say whether `release` has the flag, as far as can be told from the releases read."""
    if release == UNKNOWN_RELEASE:
        return True
    if release in table.releases:
        return flag.since <= release and (flag.until is None or release <= flag.until)
    older = [r for r in table.releases if r < release]
    newer = [r for r in table.releases if r > release]
    came = flag.since <= (newer[0] if older and newer else older[-1] if older else newer[0])
    stays = flag.until is None or not older or (bool(newer) and flag.until >= older[-1])
    return came and stays


def nearest(table: FlagTable, name: str, release: Release) -> str:
    """Return the flag of `release` whose name is the closest; empty: none is close."""
    names = [f.name for f in table.flags.values() if available(table, f, release)]
    long = [other for other in names if other.startswith("--")]
    close = difflib.get_close_matches(name, long, n=1, cutoff=_CLOSE)
    return close[0] if close else ""


def _flags_of(table: FlagTable, args: Sequence[str]) -> Iterator[_Given]:
    for index, arg in enumerate(args):
        if not starts_flag(arg):
            continue
        if table.engine == "vllm" and _OPTIMIZATION.fullmatch(arg):
            continue  # -O2 is --optimization-level 2
        text, equals, _ = arg.partition("=")
        base, dot, _ = text.partition(".")  # vLLM: --compilation-config.mode 3
        if table.engine != "vllm":
            base, dot = text, ""
        elif base.startswith("--"):
            base = base.replace("_", "-")
        followed = index + 1 < len(args) and not starts_flag(args[index + 1])
        yield _Given(text, base, bool(equals or dot), followed)


def _negated(table: FlagTable, name: str) -> Flag | None:
    """--no-X of a flag that has this form."""
    flag = table.flags.get("--" + name.removeprefix("--no-")) if name.startswith("--no-") else None
    return flag if flag is not None and flag.kind == "either" else None


def _completions(table: FlagTable, name: str, release: Release) -> list[str]:
    """Return the flags that `name` is the beginning of: argparse takes the only one."""
    if not name.startswith("--"):
        return []
    found = [
        flag
        for flag in table.flags.values()
        if flag.name.startswith(name) and available(table, flag, release)
    ]
    return sorted({flag.stands_for if len(found) > 1 else flag.name for flag in found})


def _may_have_others(table: FlagTable, release: Release) -> bool:
    return release == UNKNOWN_RELEASE or not table.releases[0] <= release <= table.releases[-1]


def _unknown(table: FlagTable, given: _Given, release: Release, flag: Flag | None) -> str:
    when = ""
    if flag is not None:
        gone = flag.until is not None and release > flag.until
        when = f" ({flag.until} had it)" if gone else f" ({flag.since} has it)"
    hint = _hint(table, given.name, release)
    return f"{_who(table, release)} has no flag {given.text}{when}{hint}"


def _hint(table: FlagTable, name: str, release: Release) -> str:
    near = nearest(table, name, release)
    return f"; did you mean {near}?" if near else ""


def _who(table: FlagTable, release: Release) -> str:
    return f"{table.engine} {release}"


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
