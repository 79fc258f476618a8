"""The tier that a request was served by, told in its answer as OpenAI tells it.

A request that names a `service_tier` reads in its answer which one was used: at the top of a whole
answer, of each chunk of a stream, and of the response within those events of a Responses stream
that hold one. Engines know no tiers: they write null, or back what was asked, or nothing.

Only requests that name one pay for it. The answer is read by structure; a member of another object
with that name (a client's own `metadata`) stays. What is no answer (an error, `[DONE]`, what cannot
be read) passes as it came, and so does what is too long to be held: at most one line of a stream is
held, or one whole answer. A stream's chunks are framed anew, each with what came in one piece.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from typing_extensions import override

from proxy.core import claim_limits, tier_wire
from proxy.core.chunked import ChunkedDecoder, decode_followed
from proxy.core.http1 import ResponseHead
from proxy.core.pieces import Pieces

_NAME: Final = "service_tier"
_ANSWERS: Final = ("chat.completion", "chat.completion.chunk", "text_completion", "response")
_KEY: Final = b'"service_tier"'
_VALUE: Final = re.compile(rb"\s*:\s*")
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],]|:\s*', re.DOTALL)
_EMPTY: Final = b"{} \t\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"

_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_COLON: Final = 0x3A
_OPENING: Final = b"{["


def told(document: bytes, tier: bytes) -> bytes:
    """Return an answer with this tier in it; anything else as it is."""
    kind = _kind_of(document)
    if kind is None:
        return document
    if kind.object in _ANSWERS:
        return _with_tier(document, kind, tier)
    if not kind.type.startswith("response."):
        return document
    answer = bytes(kind.response)
    within = _kind_of(answer) if answer.strip(_EMPTY) else None
    if within is None:
        return document
    begin = document.find(answer)
    if document.find(answer, begin + 1) >= 0:
        begin = _find(document, "response")
    with_tier = _with_tier(answer, within, tier)
    return b"%b%b%b" % (document[:begin], with_tier, document[begin + len(answer) :])


def _kind_of(document: bytes) -> tier_wire.Kind | None:
    try:
        return tier_wire.kind.decode(document)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def _with_tier(document: bytes, kind: tier_wire.Kind, tier: bytes) -> bytes:
    """Return the document, an object that has members, with this tier in it."""
    before = bytes(kind.service_tier)
    if not before:
        close = document.rindex(b"}")
        return b'%b,"service_tier":"%b"%b' % (document[:close], tier, document[close:])
    begin = _only_value(document)
    if begin < 0 or not document.startswith(before, begin):
        begin = _find(document, _NAME)
    return b'%b"%b"%b' % (document[:begin], tier, document[begin + len(before) :])


def _only_value(document: bytes) -> int:
    """Return where the value of the only key of this name begins; -1: it may not be the only one.

    A search is enough: within a string every quote is escaped, and no key is written by escapes.
    """
    at = document.find(_KEY)
    if at < 0 or b"\\u" in document or document.find(_KEY, at + len(_KEY)) >= 0:
        return -1
    match = _VALUE.match(document, at + len(_KEY))
    return match.end() if match else -1


def _find(document: bytes, name: str) -> int:
    """Return where the value of a member begins that the document has, which is right JSON.

    Of several of one name the last counts. Only where a search would not be enough.
    """
    value, depth, key_due, found = -1, 0, False, False
    for match in _TOKEN.finditer(document):
        at = match.start()
        first = document[at]
        if first == _QUOTE:
            if key_due:
                key_due, found = False, _is_name(document[at : match.end()], name)
        elif first in _OPENING:
            depth += 1
            key_due = depth == 1
        elif first == _COLON:
            if depth == 1 and found:
                value, found = match.end(), False
        elif first == _COMMA:
            key_due = depth == 1
        else:
            depth -= 1
    return value


def _is_name(key: bytes, name: str) -> bool:
    if b"\\" in key:
        return tier_wire.text.decode(key) == name
    return key[1:-1] == name.encode()


class Echo:
    """Tells the tier in an answer as it comes."""

    __slots__ = ("_decoder", "_held", "_tier", "holds")

    def __init__(self, tier: bytes, *, chunked: bool) -> None:
        self._tier = tier
        self._decoder = ChunkedDecoder() if chunked else None
        self._held = Pieces()
        self.holds = False  # the whole answer, so that its head cannot be sent yet

    def feed(self, octets: bytes) -> bytes:
        """Take octets as they came; return those to relay, which may be none."""
        data = octets if self._decoder is None else decode_followed(self._decoder, octets)
        return self._framed(self._read(data)) if data else b""

    def end(self) -> bytes:
        """The answer has ended; return what is left to relay."""
        last = self._framed(self._rest())
        return last if self._decoder is None else last + _LAST_CHUNK

    def _framed(self, data: bytes) -> bytes:
        if self._decoder is None or not data:
            return data
        return b"%x\r\n%b\r\n" % (len(data), data)

    def _read(self, data: bytes) -> bytes:
        raise NotImplementedError

    def _rest(self) -> bytes:
        return self._held.take()


class StreamEcho(Echo):
    """In each event of a stream. Held is a line that has not ended."""

    __slots__ = ("_passes",)

    def __init__(self, tier: bytes, *, chunked: bool) -> None:
        super().__init__(tier, chunked=chunked)
        self._passes = False  # the line is too long to be held

    @override
    def _read(self, data: bytes) -> bytes:
        end = data.rfind(b"\n") + 1
        if not end:
            return self._hold(data)
        out = []
        if self._passes:
            first = data.find(b"\n") + 1
            out.append(data[:first])
            self._passes = False
            lines = data[first:end]
        else:
            self._held.add(data[:end])
            lines = self._held.take()
        out += [self._line(line) for line in lines.split(b"\n")[:-1]]
        out.append(self._hold(data[end:]))
        return b"".join(out)

    def _hold(self, data: bytes) -> bytes:
        """Keep the beginning of a line; return what of it passes."""
        if self._passes:
            return data
        self._held.add(data)
        # Lines may end in a CR alone (WHATWG HTML §9.2.5): rather untold than late.
        by_cr = 0 <= data.find(b"\r") < len(data) - 1
        if self._held.size <= claim_limits.TIER_HELD_BYTES_MAX and not by_cr:
            return b""
        self._passes = True
        return self._held.take()

    def _line(self, line: bytes) -> bytes:
        if not line.startswith((b"data: {", b"data:{")):
            return line + b"\n"
        begin = line.index(b"{")
        return b"%b%b\n" % (line[:begin], told(line[begin:], self._tier))


class WholeEcho(Echo):
    """In an answer of one piece, of which the length is another then."""

    __slots__ = ()

    def __init__(self, tier: bytes, *, chunked: bool) -> None:
        super().__init__(tier, chunked=chunked)
        self.holds = True

    @override
    def _read(self, data: bytes) -> bytes:
        if not self.holds:
            return data
        self._held.add(data)
        if self._held.size <= claim_limits.TIER_HELD_BYTES_MAX:
            return b""
        self.holds = False
        return self._held.take()

    @override
    def _rest(self) -> bytes:
        return told(self._held.take(), self._tier) if self.holds else b""


def echo_for(head: ResponseHead, length: int, tier: bytes) -> Echo | None:
    """Return what tells the tier in the answer that has this head, or None where nothing can."""
    fields = dict(head.fields)
    if head.status != 200 or fields.get(b"content-encoding", b"identity").lower() != b"identity":
        return None
    if head.event_stream:
        return None if head.counted else StreamEcho(tier, chunked=head.chunked)
    if not fields.get(b"content-type", b"").lower().startswith(b"application/json"):
        return None
    if head.chunked or 0 < length <= claim_limits.TIER_HELD_BYTES_MAX:
        return WholeEcho(tier, chunked=head.chunked)
    return None
