"""Write `licences.md`: what an installation brings with it, and under which licences.

    .venv/bin/python deploy/licences.py

Read from what is installed here. A package's own SPDX expression counts; before that field came
(https://peps.python.org/pep-0639/), classifiers and a free text told, which are read as SPDX names.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "deploy" / "licences.md"
BASE = "base"

# What classifiers and free texts call them.
SPDX: Mapping[str, str] = {
    "apache software license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "mit license": "MIT",
    "mit no attribution license (mit-0)": "MIT-0",
    "bsd license": "BSD",
    "bsd": "BSD",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "isc license (iscl)": "ISC",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}
# Where the package says nothing that can be read, or is not installed where this runs: what its
# sources say.
KNOWN: Mapping[str, str] = {
    "aiodocker": "Apache-2.0",
    "atheris": "Apache-2.0",
    "cuda-bindings": "LicenseRef-NVIDIA-SOFTWARE-LICENSE",
    "nvidia-ml-py": "BSD-3-Clause",
    "sglang": "Apache-2.0",
    "uvloop": "MIT OR Apache-2.0",
    "vllm": "Apache-2.0",
}
# Binaries that wheels hold beside what the package itself is.
HELD = {"pyzmq": "libzmq: MPL-2.0"}
NOTHING_ELSE = ("sglang", "vllm", "gpu")  # whose own trees are the engines' and the vendor's matter

HEAD = """\
# Licences

Doherty is Apache-2.0; one trace of the load test is CC-BY-4.0
([data](../loadtest/data/README.md)). This is what an installation brings with it: what
`pyproject.toml` names (**bold**), and what that needs in turn. It is made by `deploy/licences.py`
from the packages' own words; who says only BSD is told so. Versions, and what a release really
had, are in its bill of materials (`doherty-VERSION.cdx.json`, CycloneDX).

MPL-2.0 binds changes to its own files, and no work that uses them. Nothing that runs beside a proxy
or manager is under GPL, LGPL or AGPL; a test holds that.
"""


def declared(root: Path = ROOT) -> dict[str, tuple[Requirement, ...]]:
    """Return what the project asks for, by extra; `base` is what it cannot do without."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {BASE: project["dependencies"], **project["optional-dependencies"]}
    return {name: tuple(map(Requirement, texts)) for name, texts in groups.items()}


def closure(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Return the licence of all that `wanted` brings, by the packages' names."""
    found: dict[str, str] = {}
    waiting = list(wanted)
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting.extend(needs(name, extra))
        if name != "doherty":
            found[name] = licence(name)
    return dict(sorted(found.items()))


def needs(name: str, extra: str) -> Iterator[Requirement]:
    """Yield what a package needs here by itself, or more of with `extra`."""
    told = installed(name)
    for text in told.get_all("Requires-Dist") or () if told is not None else ():
        requirement = Requirement(text)
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        if plain if not extra else marker is not None and marker.evaluate({"extra": extra}):
            yield requirement


def installed(name: str) -> Message | None:
    try:
        told = metadata(name)
    except PackageNotFoundError:
        return None
    return told if isinstance(told, Message) else None


def licence(name: str) -> str:
    """Return the package's licence as SPDX; "?" where it cannot be told."""
    told = installed(name)
    if told is not None and told.get("License-Expression"):
        return str(told["License-Expression"])
    if name in KNOWN or told is None:
        return KNOWN.get(name, "?")
    classifiers = told.get_all("Classifier") or ()
    marks = [text.rsplit(" :: ", 1)[1] for text in classifiers if text.startswith("License ::")]
    names = {SPDX[mark.lower()] for mark in marks if mark.lower() in SPDX}
    if names:
        return " OR ".join(sorted(names))
    text = str(told.get("License") or "").strip()
    return SPDX.get(text.lower(), text if re.fullmatch(r"[\w.+ ()-]{2,60}", text) else "?")


def page() -> str:
    groups = declared()
    always = closure(groups[BASE])
    parts, shown = [HEAD, table("Always", groups[BASE], always)], set(always)
    for group, wanted in groups.items():
        if group in (BASE, "dev"):
            continue
        alone = () if group in NOTHING_ELSE else closure(wanted).items()
        rows = {name: said for name, said in alone if name not in always}
        shown |= rows.keys()
        parts.append(table(f"Extra `{group}`", wanted, rows))
    others = {name: said for name, said in closure(groups["dev"]).items() if name not in shown}
    parts.append(table("Extra `dev`, beside those", groups["dev"], others))
    return "\n".join(parts)


def table(title: str, wanted: Iterable[Requirement], rows: Mapping[str, str]) -> str:
    """Return a section of `rows`, and of all `wanted` whether they are among them or not."""
    asked = {canonicalize_name(one.name) for one in wanted} - {"doherty"}
    everything = {name: licence(name) for name in asked} | dict(rows)
    lines = [
        f"| {bold(name, asked)} | {with_held(name, said)} |"
        for name, said in sorted(everything.items())
    ]
    return "\n".join((f"## {title}\n", "| package | licence |", "|---|---|", *lines, ""))


def bold(name: str, asked: Collection[str]) -> str:
    return f"**{name}**" if name in asked else name


def with_held(name: str, said: str) -> str:
    return f"{said}; in its wheel {HELD[name]}" if name in HELD else said


def main() -> int:
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
