"""How urgent work is: three classes, and which of them a request is of.

Online work has a person who waits for its first word; semi-online work comes in bursts and must be
done in minutes; offline work only has to be done. A request says so by its `service_tier`, in the
words of OpenAI's API; one that says nothing is of the class of its model's pool. Who says "auto" or
"default" asks for no tier of his own, and so has said nothing.

What a body says is outweighed by the field `x-doherty-class`, which has the names of the classes
and one more: `spare`, such as the lines of a job. That is offline work that may have only what is
spare: it goes where it can go at once, or is told to come again; it never waits in front of
anybody, and nothing is started or kept up for it.

The class decides only among those who wait: who goes first, who may take how much of the room, and
how long. A request that can go at once goes, whatever it is.
"""

from __future__ import annotations

from typing import Final

from proxy.core import limits

ONLINE: Final = 0
SEMI_ONLINE: Final = 1
OFFLINE: Final = 2
UNSAID: Final = -1
NAMES: Final[tuple[str, ...]] = ("online", "semi-online", "offline")  # the most urgent first

# By class: how long it yields to online work, its part of the room, and how patient it is.
YIELD_S: Final[tuple[float, ...]] = (0.0, limits.SEMI_ONLINE_YIELD_S, limits.OFFLINE_YIELD_S)
SHARES: Final[tuple[float, ...]] = (1.0, limits.SEMI_ONLINE_SHARE, limits.OFFLINE_SHARE)
PATIENCE: Final[tuple[float, ...]] = (
    1.0,
    limits.SEMI_ONLINE_PATIENCE_WEIGHT,
    limits.OFFLINE_PATIENCE_WEIGHT,
)

SPARE: Final = b"spare"
_FIELD_VALUES: Final[dict[bytes, int]] = {
    b"online": ONLINE, b"semi-online": SEMI_ONLINE, b"offline": OFFLINE, SPARE: OFFLINE,
}  # fmt: skip
# OpenAI's "fast" and "ultrafast" are "priority" by other names, and "scale" is capacity bought in
# advance; "flex" is cheap and may take long.
_TIERS: Final[dict[str, int]] = {
    "priority": ONLINE, "fast": ONLINE, "ultrafast": ONLINE, "scale": ONLINE, "flex": OFFLINE,
}  # fmt: skip
# The classes of SGLang's gateway. Its "default" is what a request gets that says nothing.
_PRIORITIES: Final[dict[bytes, int]] = {
    b"system": ONLINE, b"interactive": ONLINE, b"bulk": OFFLINE,
    b"online": ONLINE, b"semi-online": SEMI_ONLINE, b"offline": OFFLINE,
}  # fmt: skip


def class_of_tier(service_tier: str | None) -> int:
    """Return the class that a request asks for; `UNSAID` where it leaves that to its pool."""
    return UNSAID if service_tier is None else _TIERS.get(service_tier, UNSAID)


def class_of_field(value: bytes) -> int:
    """Return the class that `x-doherty-class` names; `UNSAID` where it names none."""
    return _FIELD_VALUES.get(value, UNSAID)


def class_of_priority(value: bytes) -> int:
    """Return the class that `x-priority` names, in lower case; `UNSAID` where it names none."""
    return _PRIORITIES.get(value, UNSAID)


def class_named(name: str) -> int:
    """Return the class of a name. One that we do not know is that of a newer manager: online."""
    return NAMES.index(name) if name in NAMES else ONLINE
