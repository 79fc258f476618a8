"""What kind of thing an engine's answer is, as msgspec reads it.

A module of its own for the same reason as `wire.py`: what msgspec decodes into is not translated.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from proxy.core.body_wire import NOTHING


class Kind(msgspec.Struct, gc=False):
    """`object` names an answer or a piece of one, `type` an event of the Responses API."""

    object: str = ""
    type: str = ""
    service_tier: Raw = NOTHING
    response: Raw = NOTHING


kind: Final = msgspec.json.Decoder(Kind)
text: Final = msgspec.json.Decoder(str)
