"""Which wheels a host lacks, where they come from, and the folder that they become.

A lock names every package in one version, as it was tried. A line with `# host` says that the
host's own version does where it has one; any other package is left out only when the host has that
very version. The site is what `pip install --target` would make of the wheels, less what stays
behind; files that stay behind are never written.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# The glibc levels that wheels are built for (PEP 600) and their older names; pip matches exactly.
_GLIBC_MINORS = (39, 38, 36, 35, 34, 31, 28, 27, 24, 17, 12, 5)
_GLIBC_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_LINE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;#]+)\s*(?:#\s*(.*))?$")


# A host that was not described has torch, and what torch brings along.
HOST_PACKAGES = frozenset(
    {"torch", "triton", "setuptools", "sympy", "networkx", "jinja2", "fsspec"}
)


class WheelError(Exception):
    """One line: what is wrong and what to do."""


class Wanted(NamedTuple):
    """A line of a lock."""

    name: str
    version: str
    host_will_do: bool


class Host(NamedTuple):
    """What the host is; `packages` maps names to versions, an empty one is not known."""

    python: str
    torch: str
    cuda: str
    arch: int
    glibc: str = "2.39"
    machine: str = "x86_64"
    packages: Mapping[str, str] = {}

    @property
    def python_minor(self) -> str:
        return ".".join(self.python.split(".")[:2])


class Left(NamedTuple):
    """What stayed behind for one rule."""

    why: str
    files: int
    bytes: int


def canonical(name: str) -> str:
    """Return the one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_host(path: Path) -> Host:
    """Read what `host.py` printed on the host."""
    try:
        told = json.loads(path.read_text())
        packages = {canonical(name): version for name, version in told["packages"].items()}
        return Host(
            told["python"],
            told["torch"],
            told["cuda"],
            int(told["arch"]),
            told.get("glibc", "2.39"),
            told.get("machine", "x86_64"),
            packages,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WheelError(
            f"{path} does not describe a host ({error!r}); make it by host.py, on the host"
        ) from error


def read_lock(text: str, name: str) -> tuple[Wanted, ...]:
    """Read a lock; each line is NAME==VERSION, and may end in `# host`."""
    found: dict[str, Wanted] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise WheelError(f"{name}:{number}: '{line}' is no NAME==VERSION; pin it")
        package = canonical(match[1])
        if package in found:
            raise WheelError(f"{name}:{number}: {package} is named twice; leave one line")
        found[package] = Wanted(package, match[2], (match[3] or "").strip() == "host")
    if not found:
        raise WheelError(f"{name} names no package; write one NAME==VERSION a line")
    return tuple(found.values())


def goes_without(text: str) -> frozenset[str]:
    """Return what a lock says was not there when it was tried: `# goes without: NAME NAME …`."""
    found = re.findall(r"^#\s*goes without:(.*)$", text, re.MULTILINE)
    return frozenset(canonical(name) for names in found for name in names.split())


def lacking(wanted: Iterable[Wanted], host: Host) -> tuple[Wanted, ...]:
    """Return what the host has not, or has in a version that was not tried."""
    return tuple(
        line
        for line in wanted
        if line.name not in host.packages
        or (not line.host_will_do and host.packages[line.name] != line.version)
    )


def platforms(glibc: str, machine: str) -> tuple[str, ...]:
    """Return the platform tags that a host with this glibc takes."""
    minor_max = int(glibc.split(".")[1])
    tags = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS if minor <= minor_max]
    tags += [f"{name}_{machine}" for minor, name in _GLIBC_NAMES.items() if minor <= minor_max]
    return (*tags, f"linux_{machine}")


def fetch(
    wanted: Sequence[Wanted], host: Host, folder: Path, find_links: Path | None
) -> tuple[Path, ...]:
    """Have a wheel of each in `folder`, asking only for those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [place for place in (find_links, folder) if place is not None]
    missing = _missing(wanted, _found(places, host))
    if missing and find_links is None:
        _download(missing, host, folder)
        missing = _missing(wanted, _found(places, host))
    if missing:
        line = missing[0]
        raise WheelError(
            f"no wheel of {line.name} {line.version} for Python {host.python_minor} is in "
            f"{places[0]}; name a version in the lock that has one"
        )
    there = _found(places, host)
    return tuple(there[line.name, line.version] for line in wanted)


def _found(places: Sequence[Path], host: Host) -> dict[tuple[str, str], Path]:
    return {key: path for place in places for key, path in find_wheels(place, host).items()}


def _missing(wanted: Sequence[Wanted], there: Mapping[tuple[str, str], Path]) -> list[Wanted]:
    return [line for line in wanted if (line.name, line.version) not in there]


def find_wheels(folder: Path, host: Host) -> dict[tuple[str, str], Path]:
    """Return the wheels of a folder that fit the host, by name and version."""
    minor = host.python_minor.replace(".", "")
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*.whl")):
        fields = path.name.removesuffix(".whl").split("-")
        if _fits(fields[-3], fields[-2], minor) and _on(fields[-1], host):
            found[canonical(fields[0]), fields[1]] = path
    return found


def _fits(pythons: str, abis: str, minor: str) -> bool:
    """Say whether one of a wheel's tags is of this Python: its own, the stable ABI, or none."""
    for python in pythons.split("."):
        if python in (f"cp{minor}", f"py{minor}", "py3", "py2"):
            return True
        if "abi3" in abis.split(".") and re.fullmatch(r"cp3\d+", python):
            return int(python[3:]) <= int(minor[1:])
        if "none" in abis.split(".") and re.fullmatch(r"(cp|py)3\d+", python):
            return int(python[3:]) <= int(minor[1:])
    return False


def _on(tags: str, host: Host) -> bool:
    allowed = ("any", *platforms(host.glibc, host.machine))
    return any(tag in allowed for tag in tags.split("."))


def _download(missing: Sequence[Wanted], host: Host, folder: Path) -> None:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--implementation", "cp"),
        *("--python-version", host.python_minor, "--dest", str(folder)),
        *(part for tag in platforms(host.glibc, host.machine) for part in ("--platform", tag)),
        *(f"{line.name}=={line.version}" for line in missing),
    ]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise WheelError(
            f"pip could not fetch {len(missing)} wheels (status {status}); its messages are above. "
            "Is a package index within reach?"
        )


def unpack_wheel(
    wheel: Path, site: Path, leave: Sequence[tuple[str, str]], left: dict[str, Left]
) -> None:
    """Write a wheel's files into `site`, but for those that match a (pattern, why) of `leave`."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = _place(entry.filename)
            if entry.is_dir() or name is None:
                continue
            rule = next(
                ((pattern, why) for pattern, why in leave if fnmatch.fnmatchcase(name, pattern)),
                None,
            )
            if rule is not None:
                before = left.get(rule[0], Left(rule[1], 0, 0))
                left[rule[0]] = Left(rule[1], before.files + 1, before.bytes + entry.file_size)
                continue
            target = site / name
            if not target.resolve().is_relative_to(site.resolve()):
                raise WheelError(f"{wheel.name} would write outside its folder: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            if entry.external_attr >> 16 & 0o111:
                target.chmod(0o755)


def _place(name: str) -> str | None:
    """Return where a wheel's file goes below the site (PEP 427); None: nowhere."""
    top, _, rest = name.partition("/")
    if not top.endswith(".data"):
        return name
    scheme, _, inner = rest.partition("/")
    if scheme in ("purelib", "platlib", "data"):
        return inner or None
    return f"bin/{inner}" if scheme == "scripts" and inner else None


def unmet(site: Path, host: Host, without: frozenset[str]) -> list[str]:
    """Return what the packages of `site` ask for, and neither it nor the host has.

    Names alone: the versions in a lock are those that were tried, whatever the packages say. Torch
    is the host's, whether it was described or not.
    """
    there = {canonical(name) for name in host.packages} | without | HOST_PACKAGES
    asked: dict[str, str] = {}
    for metadata in sorted(site.glob("*.dist-info/METADATA")):
        head = metadata.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
        name = canonical(metadata.parent.name.split("-")[0])
        there.add(name)
        for line in head.splitlines():
            match = re.match(r"Requires-Dist:\s*([A-Za-z0-9._-]+)([^;]*)(;.*)?$", line)
            if match and not match[3]:  # one with a marker is for an extra or another platform
                asked.setdefault(canonical(match[1]), name)
    return [
        f"{name} (asked for by {by})" for name, by in sorted(asked.items()) if name not in there
    ]
