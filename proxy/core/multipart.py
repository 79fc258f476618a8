"""The `model` and the `file` of a multipart form, for the audio endpoints (RFC 7578).

The form is otherwise opaque: it goes to the replica as it came.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core import limits

_BOUNDARY: Final = re.compile(
    rb'multipart/form-data\s*;.*?boundary="?([0-9A-Za-z\'()+_,./:=? -]{1,70})"?', re.IGNORECASE
)
_PART: Final = re.compile(
    rb'^content-disposition:\s*form-data\s*;[^\r\n]*?\bname="?(model|file)"?\s*(?:;|$)',
    re.IGNORECASE | re.MULTILINE,
)
_PARTS_MAX: Final = 64
_PART_HEAD_BYTES_MAX: Final = 4096


class Form:
    """What a form says: the model or empty, and where in the body the file lies, if anywhere."""

    __slots__ = ("file_begin", "file_end", "model")

    def __init__(self) -> None:
        self.model = ""
        self.file_begin = 0
        self.file_end = 0


def read_form(content_type: bytes, body: bytes) -> Form:
    """Return the first field of each name. A form that is none has none."""
    form = Form()
    found = _BOUNDARY.match(content_type)
    if found is None:
        return form
    delimiter = b"--" + found[1].rstrip()
    at = body.find(delimiter)
    names: set[bytes] = set()
    for _ in range(_PARTS_MAX):
        if at < 0 or len(names) == 2:
            break
        start = at + len(delimiter)
        end = body.find(b"\r\n" + delimiter, start)
        head_end = body.find(b"\r\n\r\n", start, start + _PART_HEAD_BYTES_MAX)
        if head_end < 0 or end < head_end + 4:
            break
        part = _PART.search(body[start:head_end].replace(b"\r\n", b"\n"))
        if part is not None and part[1].lower() not in names:
            names.add(part[1].lower())
            _take(form, part[1].lower(), body, head_end + 4, end)
        at = end + 2
    return form


def _take(form: Form, name: bytes, body: bytes, begin: int, end: int) -> None:
    if name == b"file":
        form.file_begin, form.file_end = begin, end
    elif end - begin <= limits.MODEL_BYTES_MAX:
        form.model = body[begin:end].decode("utf-8", "replace")
