"""What `doherty --version` says: what a report of a fault has to name.

Read from what is installed, without importing any of it: an engine takes half a minute to import.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

ENGINES = ("sglang", "vllm")


def story(compiled: str | None) -> str:
    """Return the lines; `compiled` is the folder of the translation that workers would run."""
    found = [f"{name} {said}" for name in ENGINES if (said := installed(name))]
    form = f"machine code, {compiled}" if compiled else "the sources (see doherty compile)"
    lines = (
        f"doherty {installed('doherty') or 'of no installed release'}",
        f"python     {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"data path  {form}",
        f"engines    {', '.join(found) or 'none installed in this environment'}",
    )
    return "\n".join(lines)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
