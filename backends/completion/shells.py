"""The scripts, in the languages of three shells. They ask a running manager only for its names.

A word counts as a command where the ones before it make it one: flags may stand between, and the
value of a flag that looks like a command is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from backends.completion.tree import Flag, Kind, Node, Value, nodes

# Of a table of the running manager's: the first column is the name; lines of words follow it. Names
# that a shell would read something into are left out: bash's compgen expands what it is given.
_FIRST_COLUMN = (
    "awk 'NR > 1 && $1 ~ /^[A-Za-z0-9][A-Za-z0-9._@+:\\/-]*$/ && $1 !~ /:$/ "
    """&& $2 != "waits:" { print $1 }'"""
)
_NAMES = {
    Kind.REPLICA: f"doherty status 2>/dev/null | {_FIRST_COLUMN}",
    Kind.POOL: f"doherty scale 2>/dev/null | {_FIRST_COLUMN}",
}


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the script for a shell."""
    makers = {"bash": bash, "zsh": zsh, "fish": fish}
    return makers[shell](tuple(nodes(parser)))


def bash(tree: tuple[Node, ...]) -> str:
    paths = " | ".join(f"'{' '.join(node.path)}'" for node in tree if node.path)
    lines = [
        "# doherty: completion for bash",
        "_doherty() {",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= word i",
        "    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then",
        "        prev=${COMP_WORDS[COMP_CWORD-2]}",
        "    fi",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${path:+$path }${COMP_WORDS[i]}",
        f"        case $word in {paths}) path=$word ;; esac",
        "    done",
        "    COMPREPLY=()",
        '    case "$path $prev" in',
    ]
    for node in tree:
        for flag in node.flags:
            if flag.value is not None:
                at = " | ".join(_quoted(f"{' '.join(node.path)} {name}") for name in flag.names)
                lines.append(f"        {at}) {_bash_value(flag.value)}; return ;;")
    lines += ["    esac", "    if [[ $cur == -* ]]; then", '        case "$path" in']
    for node in tree:
        names = " ".join(name for flag in node.flags for name in flag.names)
        lines.append(f"        {_quoted(' '.join(node.path))}) {_bash_words(names)} ;;")
    lines += ["        esac", "        return", "    fi", '    case "$path" in']
    for node in tree:
        act = _bash_free(node)
        if act:
            lines.append(f"        {_quoted(' '.join(node.path))}) {act} ;;")
    lines += ["    esac", "}", "complete -o bashdefault -F _doherty doherty", ""]
    return "\n".join(lines)


def zsh(tree: tuple[Node, ...]) -> str:
    lines = ["#compdef doherty", "# doherty: completion for zsh", ""]
    for node in tree:
        lines += [f"{_function(node.path)}() {{", *_zsh_body(node), "}", ""]
    lines += [
        '_doherty_replicas() { local -a names; names=(${(f)"$(' + _NAMES[Kind.REPLICA] + ')"})',
        "    compadd -a names",
        "}",
        '_doherty_pools() { local -a names; names=(${(f)"$(' + _NAMES[Kind.POOL] + ')"})',
        "    compadd -a names",
        "}",
        "",
        # Loaded by compinit from a file, it is called at once; sourced, it registers itself.
        'if [[ $funcstack[1] == _doherty ]]; then _doherty "$@"; else compdef _doherty doherty; fi',
        "",
    ]
    return "\n".join(lines)


def fish(tree: tuple[Node, ...]) -> str:
    paths = " ".join(_quoted(" ".join(node.path)) for node in tree if node.path)
    lines = [
        "# doherty: completion for fish",
        "function __doherty_at",
        "    set -l path",
        "    for word in (commandline -opc)[2..-1]",
        '        set -l longer (string trim -- "$path $word")',
        f"        contains -- $longer {paths}; and set path $longer",
        "    end",
        '    test "$path" = "$argv"',
        "end",
        "complete -c doherty -f",
    ]
    for node in tree:
        at = f"complete -c doherty -n {_quoted('__doherty_at ' + ' '.join(node.path))}"
        for name, purpose in node.commands:
            lines.append(f"{at} -a {name} -d {_quoted(purpose)}")
        lines += [f"{at} {_fish_flag(flag)}" for flag in node.flags]
        lines += [f"{at} {_fish_value(value)}" for value in node.values if _fish_value(value)]
    return "\n".join((*lines, ""))


def _bash_free(node: Node) -> str:
    """Return what completes a word that is no flag."""
    if node.commands:
        return _bash_words(" ".join(name for name, _ in node.commands))
    known = [value for value in node.values if value.kind is not Kind.ANY]
    return _bash_value(known[0]) if known else ""


def _bash_value(value: Value) -> str:
    match value.kind:
        case Kind.WORD:
            return _bash_words(" ".join(value.words))
        case Kind.FILE:
            return 'compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur"))'
        case Kind.FOLDER:
            return 'compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur"))'
        case Kind.REPLICA | Kind.POOL:
            return f'COMPREPLY=($(compgen -W "$({_NAMES[value.kind]})" -- "$cur"))'
        case Kind.ANY:
            return ":"


def _bash_words(words: str) -> str:
    return f'COMPREPLY=($(compgen -W {_quoted(words)} -- "$cur"))'


def _zsh_body(node: Node) -> list[str]:
    specs = [_zsh_flag(flag) for flag in node.flags]
    if not node.commands:
        specs += [_zsh_position(value) for value in node.values]
        return ["    _arguments -s : \\", *_continued(specs)]
    listed = [f"        {_quoted(f'{name}:{_zsh_plain(text)}')}" for name, text in node.commands]
    cases = [f"        {name}) {_function((*node.path, name))} ;;" for name, _ in node.commands]
    return [
        "    local -a listed=(",
        *listed,
        "    )",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        "    _arguments -C -s : \\",
        *_continued([*specs, "'1: :->command'", "'*:: :->rest'"]),
        "    case $state in",
        "    command) _describe command listed ;;",
        "    rest)",
        "        case $words[1] in",
        *cases,
        "        esac",
        "        ;;",
        "    esac",
    ]


def _zsh_flag(flag: Flag) -> str:
    text = f"[{_zsh_plain(flag.text)}]" if flag.text else ""
    action = "" if flag.value is None else f":{_zsh_plain(flag.value.name)}:{_zsh_act(flag.value)}"
    if len(flag.names) == 1:
        return _quoted(f"{flag.names[0]}{text}{action}")
    names = ",".join(flag.names)
    return f"{{{names}}}{_quoted(f'{text}{action}')}"


def _zsh_position(value: Value) -> str:
    return _quoted(f"{'*' if value.many else ''}:{_zsh_plain(value.name)}:{_zsh_act(value)}")


def _zsh_act(value: Value) -> str:
    match value.kind:
        case Kind.WORD:
            return f"({' '.join(value.words)})"
        case Kind.FILE:
            return "_files"
        case Kind.FOLDER:
            return "_files -/"
        case Kind.REPLICA:
            return "_doherty_replicas"
        case Kind.POOL:
            return "_doherty_pools"
        case Kind.ANY:
            return " "


def _zsh_plain(text: str) -> str:
    for letter in "\\[]:":
        text = text.replace(letter, f"\\{letter}")
    return text


def _continued(specs: Iterable[str]) -> list[str]:
    listed = list(specs)
    return [f"        {spec} \\" for spec in listed[:-1]] + [f"        {listed[-1]}"]


def _fish_flag(flag: Flag) -> str:
    parts = [f"-{'l' if name.startswith('--') else 's'} {name.lstrip('-')}" for name in flag.names]
    if flag.value is not None:
        parts.append(f"-x {_fish_value(flag.value)}".rstrip())
    return " ".join((*parts, "-d", _quoted(flag.text)))


def _fish_value(value: Value) -> str:
    match value.kind:
        case Kind.WORD:
            return f"-a {_quoted(' '.join(value.words))}"
        case Kind.FILE:
            return "-a '(__fish_complete_path (commandline -ct))'"
        case Kind.FOLDER:
            return "-a '(__fish_complete_directories (commandline -ct))'"
        case Kind.REPLICA | Kind.POOL:
            return f"-a {_quoted(f'({_NAMES[value.kind]})')}"
        case Kind.ANY:
            return ""


def _function(path: tuple[str, ...]) -> str:
    return "_".join(("_doherty", *path)).replace("-", "_")


def _quoted(text: str) -> str:
    """Return a text as one word of any of the three shells."""
    return "'" + text.replace("'", "'\\''") + "'"
