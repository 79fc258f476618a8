"""Reads the command-line flags of engine releases out of their sources, into the table that ships.

    python deploy/engine_flags.py vllm FOLDER_0.26.0 FOLDER_0.33.0 > backends/engines/vllm.flags

A folder is an unpacked wheel; its version is read from the name of its metadata. Nothing of it is
imported: importing an engine needs torch, and the declarations are plain enough to be read as text.
A line is a spelling, how it takes values, the first and the last of the releases read that have it
(`-`: the newest has it), and for an alias the flag that it stands for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# How a flag takes values: never; never, but there is a --no- form; if it likes; always.
SWITCH, EITHER, MAYBE, VALUE = "switch", "either", "maybe", "value"
Flags = dict[str, tuple[tuple[str, ...], str]]  # the flag: its aliases and its kind

_FRONT_ENDS = ("entrypoints/openai/cli_args.py", "entrypoints/common/cli_args.py")
_HELP: Flags = {"--help": (("-h",), SWITCH)}


def vllm_flags(root: Path) -> Flags:
    """Flags of `vllm serve`: engine arguments by name, front-end arguments by field."""
    flags = dict(_HELP)
    tree = ast.parse((root / "engine/arg_utils.py").read_text())
    fields = _fields(tree, ("EngineArgs", "AsyncEngineArgs"))
    flags |= _added(tree, fields)
    for path in _FRONT_ENDS:
        if (root / path).exists():
            tree = ast.parse((root / path).read_text())
            fields = _fields(tree, ("BaseFrontendArgs", "FrontendArgs"))
            flags |= _added(tree, {})
            flags |= {_dashed(name): ((), _vllm_kind(text)) for name, text in fields.items()}
    return flags


def sglang_flags(root: Path) -> Flags:
    """Flags of `sglang serve`: annotated fields, and what is added by hand."""
    args = root / "srt/server_args.py"
    flags = _HELP | {"--model-type": ((), VALUE)}  # read by the command line itself
    for path in (args, *sorted((root / "srt/arg_groups/fields").glob("*.py"))):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                flags |= _annotated(node.target.id, node.annotation)
        flags |= _added(tree, {})
    return flags


def _annotated(name: str, annotation: ast.expr) -> Flags:
    """Read `name: A[type, Arg(...)]`."""
    if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple)):
        return {}
    if ast.unparse(annotation.value) not in ("A", "Annotated"):
        return {}
    kind, *marks = annotation.slice.elts
    calls = [m for m in marks if isinstance(m, ast.Call) and ast.unparse(m.func) == "Arg"]
    plain = [m for m in marks if isinstance(m, ast.Constant | ast.JoinedStr | ast.BinOp)]
    if not calls and not plain:
        return {}
    told = {k.arg: k.value for call in calls for k in call.keywords if k.arg}
    if "no_cli" in told and ast.literal_eval(told["no_cli"]):
        return {}
    flag = ast.literal_eval(told["cli_name"]) if "cli_name" in told else _dashed(name)
    aliases = tuple(ast.literal_eval(told["aliases"])) if "aliases" in told else ()
    if not flag.startswith("-"):
        return {}
    if "action" in told:
        return {flag: (aliases, _action_kind(ast.unparse(told["action"])))}
    switch = ast.unparse(kind) in ("bool", "Optional[bool]", "bool | None")
    return {flag: (aliases, SWITCH if switch else VALUE)}


def _added(tree: ast.AST, fields: dict[str, str]) -> Flags:
    """Read every `add_argument("--flag", ...)`; `fields` are the types where it does not say."""
    flags: Flags = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "add_argument":
            continue
        names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        names = [name for name in names if isinstance(name, str) and name.startswith("-")]
        if not names:
            continue
        told = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        flag = next((name for name in names if name.startswith("--")), names[0])
        field = told.get("dest", "").strip("'") or flag.lstrip("-").replace("-", "_")
        if told.get("action") == "DeprecatedAction" and "error_message" in told:
            continue  # it is there to be refused
        if told.get("nargs") == "None":
            kind = VALUE
        elif "action" in told:
            kind = _action_kind(told["action"])
        elif "nargs" in told:
            kind = MAYBE if told["nargs"] == "'?'" else VALUE
        else:
            kind = _vllm_kind(fields.get(field, "str"))
        flags[flag] = (tuple(name for name in names if name != flag), kind)
    return flags


def _action_kind(action: str) -> str:
    if "BooleanOptional" in action:
        return EITHER
    words = ("store_", "StoreTrue", "StoreConst", "DeprecatedAction", "count")
    return SWITCH if any(word in action for word in words) else VALUE


def _vllm_kind(annotation: str) -> str:
    """As vLLM makes an argument of a field: a truth is one to say yes or no to."""
    types = {part.strip() for part in annotation.split("|")}
    if types == {"bool", "str", "None"}:
        return MAYBE
    return EITHER if "bool" in types else VALUE


def _fields(tree: ast.AST, classes: tuple[str, ...]) -> dict[str, str]:
    return {
        item.target.id: ast.unparse(item.annotation)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _dashed(field: str) -> str:
    return "--" + field.replace("_", "-")


_READERS = {"vllm": vllm_flags, "sglang": sglang_flags}


def _releases(engine: str, folders: list[str]) -> list[tuple[str, Flags]]:
    found = []
    for folder in folders:
        metadata = next(Path(folder).glob(f"{engine}-*.dist-info"), None)
        if metadata is None:
            raise SystemExit(f"{folder}: no {engine}-*.dist-info in it; unpack a wheel there")
        version = metadata.name.removesuffix(".dist-info").partition("-")[2]
        found.append((version, _READERS[engine](Path(folder) / engine)))
    return sorted(found, key=lambda one: [int(part) for part in one[0].split(".")[:3]])


def _lines(engine: str, releases: list[tuple[str, Flags]]) -> Iterator[str]:
    yield f"# Flags of {engine}, read by deploy/engine_flags.py from these releases:"
    yield "# " + " ".join(version for version, _ in releases)
    spelt = [(version, dict(_spellings(flags))) for version, flags in releases]
    for name in sorted({name for _, flags in spelt for name in flags}):
        has = [version for version, flags in spelt if name in flags]
        kind, same_as = next(flags[name] for _, flags in reversed(spelt) if name in flags)
        until = "-" if has[-1] == releases[-1][0] else has[-1]
        yield " ".join([name, kind, has[0], until, *([same_as] if same_as else [])])


def _spellings(flags: Flags) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield every way to write a flag, with its kind and the flag that it is an alias of."""
    for flag, (aliases, kind) in flags.items():
        yield flag, (kind, "")
        for alias in aliases:
            yield alias, (kind, flag)


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in _READERS:
        sys.stderr.write("usage: engine_flags.py vllm|sglang FOLDER...\n")
        return 2
    for line in _lines(argv[0], _releases(argv[0], argv[1:])):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
