"""Which LoRA adapters a process has, and whether calls or only a start give it those wanted.

A process that was started without any has no room for them, and where there are several API servers
or schedulers a call would reach but one of them (`engines`). Of one whose change was not seen to
its end nobody knows what it has. And vLLM names the blocks of its prefix cache by the adapter's
name (`v1/core/kv_cache_utils.py`): a name that is given to other weights, at once or after a while,
would be answered from what the former ones computed. All this wants a new start; the rest is done
by calls, and serves on.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec


class Loaded(msgspec.Struct, frozen=True):
    """What a process has loaded."""

    paths: dict[str, str] = {}  # by name
    spent: tuple[str, ...] = ()  # names that it had, or has, and must not be given anew
    settled: bool = True  # False: told to change, and it is not known how far that went
    room: bool = False  # whether calls change what it has


class Way(enum.StrEnum):
    """How a process comes to have what is wanted."""

    NONE = "none"  # it has it
    CALLS = "calls"
    START = "start"


def after(loaded: Loaded, paths: Mapping[str, str], *, names_once: bool) -> Loaded:
    """Return what it has once it has been told to have `paths`."""
    spent = tuple(sorted({*loaded.spent, *paths})) if names_once else ()
    return msgspec.structs.replace(loaded, paths=dict(paths), spent=spent)


def way(loaded: Loaded, wanted: Mapping[str, str]) -> Way:
    """Say how what is loaded becomes what is wanted."""
    if not loaded.settled:
        return Way.START
    if loaded.paths == wanted:
        return Way.NONE
    if not loaded.room:
        return Way.START
    fresh = {name for name, path in wanted.items() if loaded.paths.get(name) != path}
    return Way.CALLS if fresh.isdisjoint(loaded.spent) else Way.START
