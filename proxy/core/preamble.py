"""A request head and all that follows from it alone, worked out once for every request that has it.

Where the path leads, who asks, which session it names, and the octets that go on to a replica.

A client may name a data-parallel rank, of a server that it cannot see. Where the proxy chooses
among ranks its choice stands, because a rank without its server means nothing; to a server whose
ranks the proxy does not know the client's word goes on as it came.

The trace that a client is in is kept apart: it goes on as it came, or, where this proxy records
traces, with one of its own spans as the parent.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from proxy import errors
from proxy.core import head as heads
from proxy.core import limits
from proxy.core.credentials import read_credential
from proxy.core.http1 import EXPLAIN, HOP, Field, RequestHead, parse_request_head
from proxy.core.replica import RANK_FIELD
from proxy.core.routes import OFFLINE_ROOTS, Route, find_route
from proxy.core.session import session_of_head
from proxy.core.trace_context import FIELDS as TRACE_FIELDS
from proxy.core.wishes import read_wishes

_VIA: Final = b"via"
_OURS: Final = b"doherty-"  # in it, where it names one of our regions
_RANK_CHOSEN: Final = b"\n" + RANK_FIELD  # in what a rank is sent first


class Preamble:
    """One checked head. `content_length` is that of the first request that had it."""

    __slots__ = (
        "asks_for_reasons",
        "chunked",
        "content_length",
        "counted",
        "credential_fields",
        "credential_problem",
        "crossed",
        "encoded",
        "head",
        "hop",
        "key_digest",
        "method",
        "method_text",
        "minor",
        "passes",
        "path",
        "path_text",
        "rank_fields",
        "request_id",
        "request_line",
        "route",
        "sent_fields",
        "session_key",
        "target",
        "trace_fields",
        "trace_lines",
        "via",
        "wishes",
    )

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.method = head.method
        self.path = head.path
        self.method_text = head.method.decode("ascii")
        self.path_text = head.path[: limits.PATH_LOGGED_BYTES_MAX].decode("ascii")
        self.minor = head.minor
        self.chunked = head.chunked
        self.content_length = head.content_length
        self.counted = head.counted
        try:
            self.route: Route | None = find_route(head.method, head.path)
        except errors.ProxyError:
            self.route = None  # there is none, and whoever needs one is told why
        # What goes on to the offline service, octet by octet, and is no exchange with a replica.
        self.passes = head.path.startswith(OFFLINE_ROOTS)
        token, self.credential_problem = read_credential(head)
        self.key_digest = sha256(token).digest()
        given = head.get(heads.REQUEST_ID)
        self.request_id = given if given and heads.valid_request_id(given) else None
        self.session_key = session_of_head(head)
        self.asks_for_reasons = EXPLAIN in head.special
        self.wishes = read_wishes(head)
        self.encoded = b"content-encoding" in head.special
        self.request_line, self.credential_fields, self.sent_fields = heads.sent_to_replica(head)
        self.target = self.request_line.split(b" ")[1]  # as we send it on
        hops = [value for name, value in head.fields if name == HOP]
        self.hop = b"" if len(hops) > 1 else hops[0] if hops else None
        self.via = b",".join([value for name, value in head.fields if name == _VIA])
        self.crossed = bool(hops) or _OURS in self.via
        self.rank_fields = b"".join(
            [b"%b: %b\r\n" % field for field in head.fields if field[0] == RANK_FIELD]
        )
        traced: list[Field] = [field for field in head.fields if field[0] in TRACE_FIELDS]
        self.trace_fields = traced
        self.trace_lines = b"".join([b"%b: %b\r\n" % field for field in traced])  # as they came

    def upstream_head(
        self,
        host_field: bytes,
        request_id: bytes,
        body_bytes: int,
        credential: bytes | None = None,
    ) -> bytes:
        """Return the whole head to send to the replica of `host_field` (see `Replica`).

        `credential` is the field that goes on in place of what the client showed, or nothing.
        """
        rank_chosen = _RANK_CHOSEN in host_field
        host_field += self.credential_fields if credential is None else credential
        if self.rank_fields and not rank_chosen:
            host_field += self.rank_fields
        if body_bytes or self.method == b"POST":
            return b"%b%b%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n" % (
                self.request_line,
                host_field,
                self.sent_fields,
                body_bytes,
                request_id,
            )
        return b"%b%b%bx-request-id: %b\r\n\r\n" % (
            self.request_line,
            host_field,
            self.sent_fields,
            request_id,
        )

    def passed_head(
        self, host_field: bytes, request_id: bytes, length: int, credential: bytes | None = None
    ) -> bytes:
        """Return the head to send where bodies pass as they come, one request a connection.

        Without a Content-Length, `length` is that of no body, and a chunked one is chunked anew.
        """
        framing = b""
        if self.chunked:
            framing = b"transfer-encoding: chunked\r\n"
        elif length or self.method == b"POST":
            framing = b"content-length: %d\r\n" % length
        return b"%b%bconnection: close\r\n%b%b%bx-request-id: %b\r\n\r\n" % (
            self.request_line,
            host_field,
            self.credential_fields if credential is None else credential,
            self.sent_fields,
            framing,
            request_id,
        )


def read_preamble(block: bytes) -> Preamble:
    """Return the preamble of a head without its final empty line. Raises `errors.ProxyError`."""
    return Preamble(parse_request_head(block))
