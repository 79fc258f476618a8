"""What we write: heads for replicas and for clients, always afresh from checked parts.

A head that came in is never copied as octets. Fields that belong to one connection stay there
(RFC 9110 §7.6.1), framing is ours, and a name or value that passed `http1` can be written as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final

from proxy import errors
from proxy.contract.behalf import PROOF_FIELD, TENANT_FIELD
from proxy.core import limits
from proxy.core.credentials import API_KEY, without_keys
from proxy.core.credentials import FIELDS as CREDENTIAL_FIELDS
from proxy.core.http1 import (
    EXPLAIN,
    HOP,
    WORK_CLASS,
    Field,
    RequestHead,
    ResponseHead,
    parse_response_head,
)
from proxy.core.replica import RANK_FIELD
from proxy.core.trace_context import FIELDS as TRACE_FIELDS
from proxy.core.wishes import ENDING_HERE

REQUEST_ID: Final = b"x-request-id"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
# Written by us, or meaningful to this hop only. Ranks and traces: see `core/preamble.py`.
_NOT_FORWARDED: Final = (
    frozenset(
        (
            *(b"host", b"content-length", b"expect", REQUEST_ID, EXPLAIN, WORK_CLASS, RANK_FIELD),
            *(b"x-vllm-priority", HOP, TENANT_FIELD.encode(), PROOF_FIELD.encode(), *TRACE_FIELDS),
        )
    )
    | ENDING_HERE
)
# With these SGLang overrides what a body says: the id, the priority, the rank. A client that sets
# them, or vLLM's field above, could go before others, or end what is theirs; so none of them ever
# passes.
_OVERRIDES: Final = b"x-override-"
_PRINTABLE: Final = re.compile(rb"[\x21-\x7e]{1,%d}" % limits.REQUEST_ID_BYTES_MAX)
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


def valid_request_id(value: bytes | None) -> bool:
    """A client's id is kept when it is short and printable; it ends up in logs."""
    return value is not None and _PRINTABLE.fullmatch(value) is not None


def sent_to_replica(request: RequestHead) -> tuple[bytes, bytes, bytes]:
    """Return what to send to a replica: request line, credentials, other fields, with line ends.

    The replica's Host field goes behind the first, the body's length and the request's id behind
    the last. Credentials are apart, because what goes on may be ours in place of the client's.
    """
    special, lines, credentials = request.special, [], []
    # Written as a bearer token, the one form that every engine checks, unless there is one already.
    key = special.get(API_KEY) if b"authorization" not in special else None
    if key:
        credentials.append(b"authorization: Bearer %b\r\n" % key)
    for name, value in request.fields:
        if name in CREDENTIAL_FIELDS:
            if not key or name != API_KEY:
                credentials.append(b"%b: %b\r\n" % (name, value))
        elif name not in _NOT_FORWARDED and not name.startswith(_OVERRIDES):
            lines.append(b"%b: %b\r\n" % (name, value))
    query = without_keys(request.query)
    request_line = b"%b %b%b HTTP/1.1\r\n" % (request.method, request.path, query)
    return request_line, b"".join(credentials), b"".join(lines)


def read_answer_head(block: bytes) -> ResponseHead:
    """Return a replica's head, and in it what clients get of it. Raises `BadResponse`."""
    head = parse_response_head(block)
    head.returned = _returned(head)
    return head


def _returned(head: ResponseHead) -> bytes:
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    lines += [b"%b: %b\r\n" % field for field in head.fields if field[0] != REQUEST_ID]
    return b"".join(lines)


def framing_line(response: ResponseHead, length: int, minor: int) -> bytes:
    """Return the line that frames an answer for a client of HTTP/1.`minor`; empty for none."""
    if response.status in (204, 304):
        return b""
    if response.chunked:
        return b"transfer-encoding: chunked\r\n" if minor == 1 else b""
    return b"content-length: %d\r\n" % length if length >= 0 else b""


def client_head(
    response: ResponseHead,
    request_id: bytes,
    *,
    framing: bytes,
    keep_alive: bool,
    extra: Sequence[Field] = (),
) -> bytes:
    """Return the head to send to a client for a replica's answer.

    `framing` is the Content-Length or Transfer-Encoding line with its line end, or empty.
    """
    return b"%b%bx-request-id: %b\r\n%b%b" % (
        response.returned,
        b"".join([b"%b: %b\r\n" % field for field in extra]) if extra else b"",
        request_id,
        framing,
        b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
    )


def waiting_head(request_id: bytes, *, keep_alive: bool, extra: Iterable[Field] = ()) -> bytes:
    """Return the head of a stream of events that begins while its request still waits."""
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"cache-control: no-cache\r\nx-request-id: %b\r\ntransfer-encoding: chunked\r\n%b%b"
    ) % (
        request_id,
        b"".join([b"%b: %b\r\n" % field for field in extra]),
        b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
    )


def with_fields(response: ResponseHead, fields: list[Field]) -> ResponseHead:
    """Return the same head with other fields. A head is never changed: others may hold it too."""
    told = ResponseHead(response.status, response.reason, response.keep_alive)
    told.chunked, told.counted = response.chunked, response.counted
    told.content_length, told.event_stream = response.content_length, response.event_stream
    told.fields = fields
    told.returned = _returned(told)
    return told


def local_answer(
    status: int,
    body: bytes,
    request_id: bytes,
    *,
    keep_alive: bool,
    extra: Iterable[Field] = (),
    content_type: bytes = b"application/json",
    head_only: bool = False,
) -> bytes:
    """Return a whole answer of our own."""
    lines = [
        b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
        % (status, _REASONS.get(status, b""), content_type, len(body), request_id)
    ]
    lines += [b"%b: %b\r\n" % field for field in extra]
    lines.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    if not head_only:
        lines.append(body)
    return b"".join(lines)


def error_fields(error: errors.ProxyError) -> list[Field]:
    """Return what an error says beside its body, in the words that the official clients obey."""
    fields: list[Field] = []
    if error.status >= 408 and error.status != 413:
        fields.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if error.wait_s:
        wait_s = min(error.wait_s, errors.RETRY_AFTER_S_MAX)
        fields.append((b"retry-after", b"%d" % wait_s))
    if isinstance(error, errors.HopRefusedError):
        fields.append((HOP, error.told))
    if error.wait_ms:
        fields.append((b"retry-after-ms", b"%d" % error.wait_ms))
    if error.status == 401:  # RFC 9110 §11.6.1: a 401 must name the scheme
        fields.append((b"www-authenticate", b"Bearer"))
    return fields


def error_answer(
    error: errors.ProxyError,
    request_id: bytes,
    *,
    keep_alive: bool,
    dialect: errors.Dialect = errors.Dialect.OPENAI,
    head_only: bool = False,
    extra: Iterable[Field] = (),
) -> bytes:
    """Return the whole answer for a failure."""
    return local_answer(
        error.status,
        error.body(dialect),
        request_id,
        keep_alive=keep_alive and not error.closes,
        extra=(*error_fields(error), *extra),
        head_only=head_only,
    )
