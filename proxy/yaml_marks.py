"""Where in a YAML file a mistake stands, and what was probably meant.

A decoder says what is wrong with a value and the path to it; a person needs the line, and the name
that is nearest to the one that nobody knows. Pure: nodes and types in, a line and words out.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import yaml


def repeated_key(node: yaml.Node) -> tuple[int, str] | None:
    """Return line and name of a key that one mapping has twice; None when there is none.

    YAML 1.2 §3.2.1.3: mapping keys are unique; PyYAML would let the last one win.
    """
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    return key.start_mark.line + 1, key.value
                seen.add(key.value)
            found = repeated_key(value)
            if found is not None:
                return found
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found = repeated_key(item)
            if found is not None:
                return found
    return None


def explain(problem: str, root: yaml.Node | None, top: type[msgspec.Struct]) -> tuple[int, str]:
    """Turn msgspec's message and JSON path into a line and words with the nearest valid name.

    `top` is what the whole file was to be.
    """
    text, _, path = problem.partition(" - at `")
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", path.rstrip("`"))
    node, section, annotation = _descend(root, steps, top)
    unknown = re.search(r"unknown field `(.*)`", text)
    if unknown and isinstance(node, yaml.MappingNode):
        key = unknown[1]
        known = list(section.__struct_encode_fields__) if section else []
        for child, _ in node.value:
            if child.value == key:
                node = child
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
        text = f"unknown key '{key}'; {hint}"
    text = with_choices(text, annotation)
    line = node.start_mark.line + 1 if node else 1
    where = ".".join(name or f"[{index}]" for name, index in steps).replace(".[", "[")
    return line, f"{where + ': ' if where else ''}{text}"


def _descend(
    node: yaml.Node | None, steps: list[tuple[str, str]], top: type[msgspec.Struct]
) -> tuple[yaml.Node | None, type[msgspec.Struct] | None, Any]:
    """Return the node, the section around it, and what the last step was declared as."""
    section: Any = top
    annotation: Any = top
    for name, index in steps:
        if name and isinstance(node, yaml.MappingNode):
            found = [value for key, value in node.value if key.value == name]
            node = found[0] if found else node
            hints = _declared(section)
            section = annotation = hints.get(name, section)
            inner = [a for a in get_args(section) if isinstance(a, type)]
            section = inner[0] if inner else section
        elif index and isinstance(node, yaml.SequenceNode):
            node = node.value[int(index)]
    valid = isinstance(section, type) and issubclass(section, msgspec.Struct)
    return node, section if valid else None, annotation


def _declared(section: Any) -> dict[str, Any]:
    """Return what each key of a section is declared as, by its name in the file."""
    if not (isinstance(section, type) and issubclass(section, msgspec.Struct)):
        return {}
    hints = get_type_hints(section)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(section)}


def with_choices(problem: str, annotation: Any) -> str:
    """Return what is wrong with a word, with those that it may be."""
    choices = _choices(annotation) if problem.startswith("Invalid enum value") else []
    return f"{problem}; use one of {', '.join(choices)}" if choices else problem


def _choices(annotation: Any) -> list[str]:
    """Return the words that a value of this type may be, where it is one of some words."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for inner in get_args(annotation) for word in _choices(inner)]
