"""The `model` field of a multipart form, for the audio endpoints (RFC 7578).

The form is otherwise opaque: it goes to the replica as it came.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core import limits

_BOUNDARY: Final = re.compile(
    rb'multipart/form-data\s*;.*?boundary="?([0-9A-Za-z\'()+_,./:=? -]{1,70})"?', re.IGNORECASE
)
_MODEL_PART: Final = re.compile(
    rb'^content-disposition:\s*form-data\s*;[^\r\n]*?\bname="?model"?\s*(?:;|$)',
    re.IGNORECASE | re.MULTILINE,
)
_PARTS_MAX: Final = 64
_PART_HEAD_BYTES_MAX: Final = 4096


def model_field(content_type: bytes, body: bytes) -> str:
    """Return the value of the form's `model` field, or empty when there is none."""
    found = _BOUNDARY.match(content_type)
    if found is None:
        return ""
    delimiter = b"--" + found[1].rstrip()
    at = body.find(delimiter)
    for _ in range(_PARTS_MAX):
        if at < 0:
            return ""
        start = at + len(delimiter)
        end = body.find(b"\r\n" + delimiter, start)
        head_end = body.find(b"\r\n\r\n", start, start + _PART_HEAD_BYTES_MAX)
        if head_end < 0 or end < head_end + 4:
            return ""
        if _MODEL_PART.search(body[start:head_end].replace(b"\r\n", b"\n")):
            value = body[head_end + 4 : end]
            if len(value) > limits.MODEL_BYTES_MAX:
                return ""
            return value.decode("utf-8", "replace")
        at = end + 2
    return ""
