"""Octets in any pieces to a verdict, with the core's readers and nothing else.

These follow the shell's use of the core (`io/server.py`, `io/upstream.py`) without its connections
and clocks, so that every vector can be judged whole, octet by octet and at any cuts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from proxy import errors
from proxy.core import limits
from proxy.core.http1 import (
    BadResponse,
    ChunkedDecoder,
    ChunkFollower,
    RequestHead,
    ResponseHead,
    check_partial_head,
    parse_request_head,
    parse_response_head,
)


class Taken(NamedTuple):
    """One request as it was understood."""

    method: bytes
    target: bytes
    body: bytes


class Verdict(NamedTuple):
    """What came of a client's octets: the requests taken, and the status of a refusal or 0."""

    taken: tuple[Taken, ...]
    refused: int
    waiting: bool  # a request has begun and has not ended


class RequestReader:
    """The octets of one client connection."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self.heads: list[RequestHead] = []
        self.refused = 0
        self._buffer = bytearray()
        self._searched = 0
        self._fresh = True  # no octet of the next request has come
        self._closed = False  # RFC 9112 §9.6: what follows a last request is not read
        self._head: RequestHead | None = None
        self._decoder: ChunkedDecoder | None = None

    def feed(self, data: bytes) -> None:
        if self.refused or self._closed:
            return
        try:
            self._feed(data)
        except errors.ProxyError as error:
            self.refused = error.status

    def verdict(self) -> Verdict:
        waiting = bool(self._buffer) or self._head is not None
        ended = self.refused or self._closed
        return Verdict(tuple(self.taken), self.refused, waiting and not ended)

    def _feed(self, data: bytes) -> None:
        self._buffer += data
        while self._buffer and not self._closed:
            if self._decoder is not None:
                more = self._chunked(self._decoder)
            else:
                more = self._counted() if self._head else self._read_head()
            if not more:
                break

    def _chunked(self, decoder: ChunkedDecoder) -> bool:
        rest = decoder.feed(bytes(self._buffer))
        self._buffer = bytearray(rest or b"")
        if rest is not None:
            self._end(decoder.body())
        return rest is not None

    def _read_head(self) -> bool:
        buffer = self._buffer
        if self._fresh and buffer.startswith(b"\r\n"):  # RFC 9112 §2.2
            del buffer[:2]
            self._fresh = False
            self._searched = 0
            return True
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        if end < 0:
            if len(buffer) > limits.HEAD_BYTES_MAX + 3:
                self._too_large(max(0, self._searched - 3))
            check_partial_head(buffer, max(0, self._searched - 3))
            self._searched = len(buffer)
            return False
        if end > limits.HEAD_BYTES_MAX:
            self._too_large(max(0, self._searched - 3))
        block = bytes(buffer[:end])
        del buffer[: end + 4]
        self._head = parse_request_head(block)
        self.heads.append(self._head)
        if self._head.chunked:
            self._decoder = ChunkedDecoder()
        elif not self._head.content_length:
            self._end(b"")
        return True

    def _too_large(self, searched: int) -> None:
        check_partial_head(self._buffer[: limits.HEAD_BYTES_MAX + 3], searched)
        raise errors.HeadTooLargeError("too large")

    def _counted(self) -> bool:
        assert self._head is not None
        size = self._head.content_length
        if len(self._buffer) < size:
            return False
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._end(body)
        return True

    def _end(self, body: bytes) -> None:
        head = self._head
        assert head is not None
        self.taken.append(Taken(head.method, head.path + head.query, body))
        self._head = self._decoder = None
        self._searched = 0
        self._fresh = True
        self._closed = not head.keep_alive


class Answer(NamedTuple):
    """What came of an engine's octets."""

    status: int  # 0: no head that could be understood
    relayed: bytes  # octets for the client after the head, chunk framing included
    ended: bool  # the body ended by its own framing
    surplus: bytes  # octets after the end: they condemn the connection
    failed: bool
    chunked: bool = False

    @property
    def payload(self) -> bytes:
        """What was relayed without its chunk framing, as far as it goes."""
        if not self.chunked:
            return self.relayed
        decoder = ChunkedDecoder()
        decoder.feed(self.relayed)
        return decoder.body()


class ResponseReader:
    """The octets of one engine connection, from the end of one request on."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.ended = False
        self.failed = False
        self.surplus = b""
        self._relayed: list[bytes] = []
        self._buffer = b""
        self._left = 0
        self._follower: ChunkFollower | None = None
        self._informational = 0

    def feed(self, data: bytes) -> None:
        if self.failed or not data:
            return
        try:
            self._feed(data)
        except BadResponse:
            self.failed = True

    def answer(self) -> Answer:
        status = self.head.status if self.head is not None else 0
        relayed = b"".join(self._relayed)
        chunked = self._follower is not None
        return Answer(status, relayed, self.ended, self.surplus, self.failed, chunked)

    def _feed(self, data: bytes) -> None:
        while self.head is None:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0 or end > limits.RESPONSE_HEAD_BYTES_MAX:
                if len(self._buffer) > limits.RESPONSE_HEAD_BYTES_MAX + 3:
                    raise BadResponse("too large")
                return
            block, data = self._buffer[:end], self._buffer[end + 4 :]
            self._buffer = b""
            self._take(parse_response_head(block))
        self._body(data)

    def _take(self, head: ResponseHead) -> None:
        if head.status < 200:
            self._informational += 1
            if head.status == 101 or self._informational > limits.INFORMATIONAL_RESPONSES_MAX:
                raise BadResponse("unexpected informational response")
            return
        self.head = head
        self._left = head.content_length
        self._follower = ChunkFollower() if head.chunked else None
        self.ended = not head.chunked and head.content_length == 0

    def _body(self, data: bytes) -> None:
        if self.ended:
            self.surplus += data
        elif self._follower is not None:
            octets, self.surplus = self._follower.feed(data)
            self._relayed.append(octets)
            self.ended = self._follower.ended
        elif self._left < 0:
            self._relayed.append(data)
        else:
            octets, self.surplus = data[: self._left], data[self._left :]
            self._left -= len(octets)
            self._relayed.append(octets)
            self.ended = self._left == 0


def read_requests(pieces: Iterable[bytes]) -> Verdict:
    reader = RequestReader()
    for piece in pieces:
        reader.feed(piece)
    return reader.verdict()


def read_response(pieces: Iterable[bytes]) -> Answer:
    reader = ResponseReader()
    for piece in pieces:
        reader.feed(piece)
    return reader.answer()


def octet_by_octet(octets: bytes) -> list[bytes]:
    return [octets[at : at + 1] for at in range(len(octets))]


def cut_at(octets: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Return the pieces of `octets` between the given places."""
    places = sorted({0, len(octets), *(min(cut, len(octets)) for cut in cuts)})
    return [octets[start:end] for start, end in itertools.pairwise(places)]
