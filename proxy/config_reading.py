"""How a file of sections is read: strictly, and with the line of what is wrong.

It knows no section: which keys there are, and what they mean, is `config`. Sections check what
spans several of their keys themselves, by a ValueError whose text says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from proxy.yaml_marks import explain, repeated_key, with_choices

Port = Annotated[int, Meta(ge=0, le=65535)]
PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Key = Annotated[str, Meta(min_length=1)]  # an empty one would open what it should close
# One that comes in a head: visible ASCII, which is what a bearer token may hold (RFC 6750 §2.1).
ShownKey = Annotated[str, Meta(min_length=1, max_length=8192, pattern=r"^[!-~]*$")]
Path = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]

# libyaml's parser where it was built in: thousands of tenants take a tenth of the time, in which a
# running proxy hears of nothing else.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

SectionT = TypeVar("SectionT", bound="Section")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the file; unknown keys are errors."""


class ConfigError(Exception):
    """The configuration cannot be used; the text says where and what to do."""


def read_text(path: str) -> str:
    """Return what is in the file at `path`. Raises `ConfigError`."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def read_yaml(
    text: str, source: str, whole: type[SectionT], respell: Callable[[Any], None]
) -> SectionT:
    """Return `text` as a `whole`; `respell` may first change plain values in place, or refuse them.

    `source` names the text in errors. Raises `ConfigError`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        repeated = repeated_key(node) if node is not None else None
        if repeated is not None:
            raise ConfigError(f"{source}:{repeated[0]}: '{repeated[1]}' is given twice")
        value = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        line = min(line, text.count("\n") + 1)  # what is missing at the end is missed after it
        raise ConfigError(f"{source}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply, or an anchor holds itself") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors of tagged values check little.
        raise ConfigError(
            f"{source}: a date, number or tag cannot be read ({error}); put text in quotes"
        ) from error
    if value is None:
        return whole()
    try:
        respell(value)
        return msgspec.convert(value, whole)
    except msgspec.ValidationError as error:
        line, words = explain(str(error), node, whole)
        raise ConfigError(f"{source}:{line}: {words}") from error


def laid_over(base: SectionT, values: Mapping[str, Any], source: str) -> SectionT:
    """Return `base` with `values`, perhaps still texts, laid over it.

    `source` names in errors who said it: `{flag}` and `{env}` stand for the key. Raises
    `ConfigError`.
    """
    merged = {name: getattr(base, name) for name in base.__struct_fields__} | dict(values)
    try:
        return msgspec.convert(merged, type(base), strict=False)
    except msgspec.ValidationError as error:
        match = re.search(r"at `\$\.(\w+)", str(error))
        key = match[1] if match else ""
        problem = with_choices(str(error).split(" - at ")[0], get_type_hints(type(base)).get(key))
        raise ConfigError(
            f"{source.format(flag=key.replace('_', '-'), env=key.upper())}: {problem}"
        ) from error


def describe_fields(section: type[Section]) -> Iterator[tuple[str, Any, str]]:
    """Yield name, bare type and description of each field, in order; flags are made of these."""
    hints = get_type_hints(section, include_extras=True)
    bare = get_type_hints(section)  # once: each look evaluates the annotation of every field
    for field in msgspec.structs.fields(section):
        if isinstance(field.default, Section):
            continue  # a part of its own, and no value that a flag could give
        annotation = hints[field.name]
        metas = [a for a in get_args(annotation) if isinstance(a, Meta) and a.description]
        yield field.name, bare[field.name], metas[-1].description or "" if metas else ""
