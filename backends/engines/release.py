"""Releases of engines, in the order in which they came out.

A release is three numbers; what follows them (`.post1`, `rc2`, `.dev3+g1a2b`) is left away, because
command lines do not change there. `UNKNOWN_RELEASE` is that of a program that would not say: what
is decided for it must hold for every supported release.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from typing_extensions import override


class Release(NamedTuple):
    """Compares as releases do; the text is what a person reads."""

    major: int
    minor: int = 0
    patch: int = 0

    @override
    def __str__(self) -> str:
        return ".".join(map(str, self)) if self != UNKNOWN_RELEASE else "of unknown release"


UNKNOWN_RELEASE: Final = Release(0)

_NUMBERS: Final = re.compile(r"v?([0-9]{1,6})\.([0-9]{1,6})(?:\.([0-9]{1,6}))?(?![0-9])")


def parse_release(text: str) -> Release:
    """Return the release that a version's text begins with; unknown when it begins with none."""
    match = _NUMBERS.match(text.strip())
    return Release(*(int(part or 0) for part in match.groups())) if match else UNKNOWN_RELEASE
