"""Requests as the lines of an input file, checked as the service checks them. Pure.

A job whose input has one bad line fails as a whole, so what can be known here is said before
anything is uploaded: the same functions judge, with the number of the request that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from backends.offline.client.errors import InputError
from backends.offline.records import JobError
from backends.offline.validation import ENDPOINTS, FileCheck, Piece, check_line

CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES = ENDPOINTS
LINE_BYTES_MAX = 32 * 1024 * 1024
_NO_MOST = 2**62  # how many lines a job may have is known to the service


def custom_id(number: int) -> str:
    """Return the id that a request without one gets."""
    return f"line-{number}"


class Lines:
    """Makes lines of requests, one after another, and refuses the first that is wrong."""

    def __init__(self, endpoint: str) -> None:
        if endpoint not in ENDPOINTS:
            raise ValueError(f"'{endpoint}' is none of {', '.join(ENDPOINTS)}")
        self.endpoint = endpoint
        self._check = FileCheck(_NO_MOST)

    @property
    def count(self) -> int:
        return self._check.lines

    def of(self, request: Mapping[str, Any]) -> bytes:
        """Return the line of a request, which is the body that would be posted. `InputError`."""
        try:
            body = orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as error:
            raise InputError(self.count + 1, f"this is no JSON object: {error}") from error
        return self.take(self.count + 1, self._wrapped(body))

    def of_text(self, line: int, octets: bytes) -> bytes:
        """Return the line for line number `line` of a file: a whole one, or only a body."""
        try:
            known = msgspec.json.decode(octets, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return self.take(line, octets)  # which says what is wrong
        whole = "custom_id" in known or "body" in known
        return self.take(line, octets if whole else self._wrapped(octets))

    def take(self, line: int, octets: bytes) -> bytes:
        """Check a whole line and count it. Raises `InputError`."""
        checked = check_line(Piece(line, 0, octets), self.endpoint, LINE_BYTES_MAX)
        if not self._check.add(checked):
            problem = self._check.problems[0]
            raise InputError(line, problem.message)
        assert not isinstance(checked, JobError)
        return octets + b"\n"

    def _wrapped(self, body: bytes) -> bytes:
        head = {"custom_id": custom_id(self.count), "method": "POST", "url": self.endpoint}
        return orjson.dumps(head)[:-1] + b',"body":' + body + b"}"


def endpoint_of(octets: bytes) -> str | None:
    """Say what endpoint a file is for, by its first line; None: it can be told by nothing."""
    try:
        known = msgspec.json.decode(octets, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return CHAT  # it is refused anyway
    if "url" in known:
        url = orjson.loads(bytes(known["url"]))
        return url if url in ENDPOINTS else CHAT
    if "messages" in known or "body" in known:
        return CHAT
    return COMPLETIONS if "prompt" in known else None
