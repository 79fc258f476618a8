"""Every key of the configuration file, as Markdown: made of the schema, so that neither is behind.

Where a key can be given by a flag or by the environment, that is shown beside it, and what has to
happen for a change of it to count. Pure: the schema and the flags in, text out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from backends.settings import MANAGER_SETTINGS, OFFLINE_SETTINGS
from proxy.config import ENVIRONMENT_PREFIX, FIXED, ProxyConfig
from proxy.config_reading import describe_fields
from proxy.config_schema import json_schema
from proxy.secret_files import SUFFIX, is_secret

_OPENING = """\
# Reference of the configuration

Every key of the file, with its type, its default, and how else it can be given. `doherty check
--reference` prints this page. [Configuration](configuration.md) says which of flag, environment and
file wins, and how a file is checked.

*Change* says what brings a change about. *reload*: the file is saved (proxy), or SIGHUP
is sent (manager, offline service; `doherty up` passes it on). *upgrade*: SIGUSR2 to the proxy, by
which no request is lost ([upgrades](upgrades.md)). *restart*: of the process that a section is for.
"""
# What managers take anew beside whole sections.
_RELOADED = frozenset(
    {"manager.docker.images", "manager.ray.versions", "offline.price_per_hour_max"}
)
_SECTIONS_RELOADED = ("models", "tenants", "jwt", "classes", "remote_regions")
_UNITS = (("_secs", "s"), ("_ms", "ms"), ("_mib", "MiB"), ("bytes", "bytes"), ("payload", "bytes"))


_OF_PROXY = frozenset(name for name, _, _ in describe_fields(ProxyConfig))
# Sizes that are shown in the unit that people say, too.
_SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"))


def reference(flags: Collection[str]) -> str:
    """Return the page; `flags` are the names of those of `doherty up` that are not the proxy's."""
    schema = json_schema()
    parts = [_OPENING]
    for path, section in _sections(schema, schema, ""):
        names = {row: _given(row, flags) for row in _rows(path, section)}
        parts.append(_part(path, section, names))
    return "\n".join(parts)


def _sections(
    schema: Mapping[str, Any], section: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each section and where it stands in the file: `models[].pools[]`."""
    yield path, section
    for key, value in section["properties"].items():
        for ref, suffix in _refs(value):
            below = f"{path}.{key}{suffix}".lstrip(".")
            yield from _sections(schema, schema["$defs"][ref.rsplit("/", 1)[-1]], below)


def _refs(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the sections that a value may be, or hold."""
    if "$ref" in value:
        yield value["$ref"], ""
    for each in value.get("anyOf", ()):
        yield from _refs(each)
    for ref, _ in _refs(value["items"]) if "items" in value else ():
        yield ref, "[]"


def _rows(path: str, section: Mapping[str, Any]) -> list[str]:
    return [f"{path}.{key}".lstrip(".") for key in section["properties"]]


def _given(row: str, flags: Collection[str]) -> tuple[str, str]:
    """Return flag and environment name of a key; empty where there is none."""
    section, _, key = row.rpartition(".")
    if section == "proxy":
        return (_flag(key), ENVIRONMENT_PREFIX + key.upper()) if key in _OF_PROXY else ("", "")
    for name, settings in (("manager", MANAGER_SETTINGS), ("offline", OFFLINE_SETTINGS)):
        for field, flag, variable in settings if section == name else ():
            if field == key:
                return _flag(flag) if flag in flags else "", ENVIRONMENT_PREFIX + variable
    return "", ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _part(path: str, section: Mapping[str, Any], names: Mapping[str, tuple[str, str]]) -> str:
    told = any(any(pair) for pair in names.values())
    heads = ["key", "what it is", "type", "default", "change"]
    if told:
        heads[4:4] = ["flag", "environment"]
    lines = [f"## {f'`{path}`' if path else 'The whole file'}", "", section["description"], ""]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for row, (flag, variable) in names.items():
        key = row.rpartition(".")[2]
        value = section["properties"][key]
        shown = flag.replace("--", "--no-") if value.get("default") is True else flag
        cells = [f"`{key}`", _meaning(value), _type(key, value), _default(key, value, section)]
        cells += [_code(shown), _variable(key, variable)] if told else []
        lines.append(_row([*cells, _change(row)]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _variable(key: str, name: str) -> str:
    """Return an environment name, and that of the file in place of which a secret may stand."""
    return f"{_code(name)}, {_code(name + SUFFIX)}" if name and is_secret(key) else _code(name)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _meaning(value: Mapping[str, Any]) -> str:
    meaning = str(value["description"])
    examples = [_literal(each) for each in value.get("examples", ())]
    if not examples or "such as" in meaning:
        return meaning
    return f"{meaning}; such as {', '.join(examples)}"


def _type(key: str, value: Mapping[str, Any]) -> str:
    words = _words(value)
    unit = next((unit for part, unit in _UNITS if part in key), "")
    return f"{words}, {unit}" if unit and ("number" in words or "integer" in words) else words


def _words(value: Mapping[str, Any]) -> str:
    """Return the type in words; what may be left empty shows by its default."""
    if "anyOf" in value:
        return " or ".join(_words(each) for each in value["anyOf"] if _is_shown(each))
    if "enum" in value:
        return ", ".join(f"`{word}`" for word in value["enum"])
    if "$ref" in value:
        return "section"
    if value["type"] == "array":
        return f"list of {_words(value['items'])}"
    if value["type"] == "object":
        return (
            f"map of name to {_words(value['additionalProperties'])}" if _is_typed(value) else "map"
        )
    return str(value["type"]) + _bounds(value)


def _is_shown(value: Mapping[str, Any]) -> bool:
    return value.get("type") != "null" and "const" not in value


def _is_typed(value: Mapping[str, Any]) -> bool:
    return bool(value.get("additionalProperties"))


def _bounds(value: Mapping[str, Any]) -> str:
    least, most = value.get("minimum"), value.get("maximum")
    if least is not None and most is not None:
        return f" {_number(least)} to {_number(most)}" if least != most else f" {_number(least)}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    told = [f"{sign} {_number(value[name])}" for name, sign in signs.items() if name in value]
    return " " + ", ".join(told) if told else ""


def _default(key: str, value: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    if key in section["required"]:
        return "*required*"
    default = value.get("default")
    if default is None or default in ([], {}):
        return ""
    if "bytes" in _type(key, value):
        for size, unit in _SIZES:
            if default % size == 0:
                return f"`{default}` ({default // size} {unit})"
    return _literal(default)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}`"
    return f"`{_number(value)}`" if isinstance(value, float) else f"`{value}`"


def _number(value: float) -> str:
    """Return a number as people write it into the file."""
    return str(int(value)) if value == int(value) else str(value)


def _change(row: str) -> str:
    section, _, key = row.rpartition(".")
    if row.startswith(_SECTIONS_RELOADED) or row in _RELOADED:
        return "reload"
    if section == "proxy":
        return "upgrade" if key in FIXED else "reload"
    if row in {"version", "proxy", "manager", "offline"}:
        return ""
    return "restart"
