"""An engine's error answer, kept until it is whole and then told as its client reads errors.

Kept are errors with an end that can be told from a cut (RFC 9112 §8), in the clear, of a size that
an error object has. Everything else passes as it comes: what only the close ends, event streams,
compressed bodies, and what turns out too large on the way. While one is kept nothing has been
written to the client, so an engine that dies within it is answered as any other lost one.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.core import head as heads
from proxy.core import limits
from proxy.core.chunked import ChunkedDecoder, decode_followed
from proxy.core.engine_errors import client_body, client_fields, with_our_body
from proxy.core.http1 import Field, ResponseHead
from proxy.errors import Dialect


class EngineAnswer:
    """One error answer on its way in."""

    __slots__ = ("_dialect", "_octets", "head")

    def __init__(self, head: ResponseHead, dialect: Dialect) -> None:
        self.head = head
        self._dialect = dialect
        self._octets = bytearray()

    def keep(self, data: bytes) -> bytes:
        """Take octets. When they have become too many, return all of them, to be passed on."""
        self._octets += data
        return bytes(self._octets) if len(self._octets) > limits.ENGINE_ERROR_BYTES_MAX else b""

    def told(self, request_id: bytes, *, keep_alive: bool, extra: Sequence[Field] = ()) -> bytes:
        """Return the whole answer for the client; the engine's has ended."""
        head = self.head
        body, wanted = self._bodies()
        if wanted is not body:
            head = heads.with_fields(head, with_our_body(head.fields))
        framing = b"content-length: %d\r\n" % len(wanted)
        return (
            heads.client_head(head, request_id, framing=framing, keep_alive=keep_alive, extra=extra)
            + wanted
        )

    def event(self) -> bytes:
        """Return what tells of it in a stream that has begun."""
        name = b"event: error\n" if self._dialect is Dialect.ANTHROPIC else b""
        lines = [b"data: %b\n" % line for line in self._bodies()[1].splitlines()]
        return name + b"".join(lines) + b"\n"

    def _bodies(self) -> tuple[bytes, bytes]:
        """Return the engine's body, and the client's; one and the same if that will do."""
        octets = bytes(self._octets)
        body = decode_followed(ChunkedDecoder(), octets) if self.head.chunked else octets
        content_type = dict(self.head.fields).get(b"content-type", b"")
        return body, client_body(self.head.status, content_type, body, self._dialect)


def told_head(head: ResponseHead, unix_s: float) -> ResponseHead:
    """Return an error's head with what clients obey about repeating: that needs no body."""
    return heads.with_fields(head, client_fields(head.status, head.fields, unix_s))


def keep_error(head: ResponseHead, length: int, dialect: Dialect) -> EngineAnswer | None:
    """Return where to keep an error answer, or None for one that passes as it comes."""
    bounded = head.chunked or 0 <= length <= limits.ENGINE_ERROR_BYTES_MAX
    coding = dict(head.fields).get(b"content-encoding", b"identity").lower()
    if bounded and not head.event_stream and coding == b"identity":
        return EngineAnswer(head, dialect)
    return None
