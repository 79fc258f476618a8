"""The file that keeps the day's sums of tenants, so that a start does not begin the day anew.

It is replaced as a whole, so whoever reads it reads one that was written whole. One that cannot be
read is named and left aside: a day's sums are worth less than a proxy that serves.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.core.quota_sums import COUNT_MAX

_Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]

_log = logging.getLogger("doherty.quotas")


class DaySums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tenants have used in a day: tokens, and billionths of the currency."""

    day: int = 0
    lives: list[str] = []  # of the proxies whose sums these are
    tenants: dict[str, tuple[_Count, _Count]] = {}


def read_sums(path: str) -> DaySums:
    """Return what was kept; nothing where there is no file."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=DaySums)
    except FileNotFoundError:
        return DaySums()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.error("quota_path: %s cannot be read, the day begins anew: %s", path, error)
        return DaySums()


def write_sums(path: str, sums: DaySums) -> None:
    """Replace the file. Raises `OSError`."""
    fresh = f"{path}.{os.getpid()}"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(sums))
            file.flush()
            os.fsync(fd)
        os.rename(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
