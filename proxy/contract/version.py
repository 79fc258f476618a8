"""Which release this is, as it is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return it; "unknown" where only the sources are there."""
    try:
        return version("doherty")
    except PackageNotFoundError:
        return "unknown"
