"""What must hold of a wheel and a source distribution before anyone gets them."""

from __future__ import annotations

import configparser
import re
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import BytesParser
from pathlib import Path

from packaging import metadata as core_metadata

PACKAGES = ("proxy/", "backends/", "loadtest/")
# Tracked in the packages and not part of them: tables of measurements, and scripts of a checkout.
NOT_INSTALLED = re.compile(r"loadtest/results/|.*\.sh$")
BESIDE = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")


class ReleaseError(Exception):
    """Something that a person has to put right first."""


def check_changelog(text: str, version: str) -> None:
    """Want the newest heading to be the version with a day, and nothing unreleased above it."""
    dated = f"`## [{version}] - YEAR-MONTH-DAY`"
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    if headings[:1] == [("Unreleased", "")]:
        between = text.split("\n## [Unreleased]\n", 1)[1].split("\n## [", 1)[0].strip()
        if between:
            raise ReleaseError(
                f"CHANGELOG.md has unreleased changes; head them {dated}, or pass --draft"
            )
        del headings[0]
    if not headings or headings[0][0] != version:
        raise ReleaseError(
            f"CHANGELOG.md has no section {version}, which is pyproject.toml's version"
        )
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", headings[0][1]):
        raise ReleaseError(f"CHANGELOG.md: the section {version} wants its day: {dated}")


def check(wheel: Path, sdist: Path, *, sources: Sequence[str], root: Path, version: str) -> None:
    """Raise `ReleaseError` with all that is wrong."""
    packaged = {
        name for name in sources if name.startswith(PACKAGES) and not NOT_INSTALLED.match(name)
    }
    in_wheel, in_sdist = wheel_files(wheel), sdist_files(sdist, f"doherty-{version}/")
    info = f"doherty-{version}.dist-info/"
    wrong = [
        *difference("wheel", packaged, {name for name in in_wheel if not name.startswith(info)}),
        *difference("source distribution", packaged | set(BESIDE), own(in_sdist)),
        *(f"{name} in the {kind} names a folder of this machine"
          for kind, files in (("wheel", in_wheel), ("source distribution", in_sdist))
          for name, octets in files.items() if str(root).encode() in octets),
        *metadata_faults(in_wheel, info, version),
    ]  # fmt: skip
    if wrong:
        raise ReleaseError("\n".join(("what was built is not right:", *wrong)))


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_files(sdist: Path, top: str) -> dict[str, bytes]:
    found = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                found[member.name.removeprefix(top)] = file.read()
    return found


def own(names: Iterable[str]) -> set[str]:
    """Return those that are sources, not what setuptools tells of them."""
    told = ("doherty.egg-info/", "PKG-INFO", "setup.cfg")
    return {name for name in names if not name.startswith(told)}


def difference(kind: str, wanted: set[str], there: set[str]) -> list[str]:
    missing = [f"{name} is missing from the {kind}" for name in sorted(wanted - there)]
    return missing + [f"{name} has no place in the {kind}" for name in sorted(there - wanted)]


def metadata_faults(files: dict[str, bytes], info: str, version: str) -> list[str]:
    """Return what an index would refuse, and what a user of the package would miss.

    The form is that of https://packaging.python.org/en/latest/specifications/core-metadata/.
    """
    try:
        metadata = core_metadata.Metadata.from_email(files[f"{info}METADATA"], validate=True)
    except core_metadata.ExceptionGroup as group:
        return [f"METADATA: {error}" for error in group.exceptions]
    message = BytesParser().parsebytes(files[f"{info}METADATA"])
    faults = []
    if str(metadata.version) != version:
        faults.append(f"METADATA is of version {metadata.version}, not {version}")
    if not metadata.description or metadata.description_content_type != "text/markdown":
        faults.append("METADATA has no description in Markdown")
    licences = metadata.license_files or ["LICENSE"]
    missing = [name for name in licences if f"{info}licenses/{name}" not in files]
    faults.extend(f"the licence {name} is missing from the wheel" for name in missing)
    if "Root-Is-Purelib: true" not in files[f"{info}WHEEL"].decode():
        faults.append("the wheel is for one platform: it holds something compiled")
    if message["License-Expression"] is None:
        faults.append("METADATA says no licence")
    scripts = configparser.ConfigParser()
    scripts.read_string(files[f"{info}entry_points.txt"].decode())
    for name, target in scripts["console_scripts"].items():
        if f"{target.partition(':')[0].replace('.', '/')}.py" not in files:
            faults.append(f"the command {name} leads to {target}, which is not there")
    return faults
