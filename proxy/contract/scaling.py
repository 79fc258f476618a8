"""What a manager tells of its scaling, as far as a proxy shows it: `GET /v1/scaling`.

The manager's own form has more, and may get more still: readers ignore what they do not know. What
is missing here has a default, so that an older manager's report can be shown as well.
"""

from __future__ import annotations

import msgspec

SCALING_PATH = "/v1/scaling"
SCALING_BYTES_MAX = 4 * 1024 * 1024


class ToldNote(msgspec.Struct, frozen=True, kw_only=True):
    """One change of mind, and what was done of it."""

    at_s: float  # Unix time
    pool: str = ""
    was: int = 0
    desired: int = 0
    reason: str = ""
    moves: tuple[str, ...] = ()


class ToldPool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool as it is and as it should be."""

    pool: str
    model: str = ""
    work_class: str = "online"
    scaled: bool = False
    min: int = 0
    max: int = 0
    desired: int = 0
    ready: int = 0
    coming: int = 0
    going: int = 0
    resting: dict[str, str] = {}  # replicas at rest, with the rung of each
    waiting: str = ""
    notes: tuple[ToldNote, ...] = ()


class ToldScaling(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it."""

    pools: tuple[ToldPool, ...] = ()


def decode_told(body: bytes) -> ToldScaling:
    """Return the report in `body`; raises `msgspec.MsgspecError` when it is not one."""
    return _DECODER.decode(body)


_DECODER = msgspec.json.Decoder(ToldScaling)
