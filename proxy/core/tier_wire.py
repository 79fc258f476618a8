"""What kind of thing an engine's answer is, as msgspec reads it.

A module of its own for the same reason as `wire.py`: what msgspec decodes into is not translated.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Kind(msgspec.Struct, gc=False):
    """`object` names an answer or a piece of one, `type` an event of the Responses API."""

    object: str = ""
    type: str = ""


kind: Final = msgspec.json.Decoder(Kind)
text: Final = msgspec.json.Decoder(str)
