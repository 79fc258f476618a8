"""What is measured: one row a case, each a call of the core as the data path makes it.

This table is all that knows the core's signatures. A row's maker prepares what a call needs and
returns the call; calls may be repeated without end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import msgspec

from proxy.core import head as heads
from proxy.core import limits, note_wire, notes
from proxy.core.engine_errors import client_body
from proxy.core.hearsay import Hearsay
from proxy.core.http1 import ChunkFollower, parse_request_head, parse_response_head
from proxy.core.index import Index
from proxy.core.picture import Picture
from proxy.core.policy import POLICIES, Request
from proxy.core.preamble import read_preamble
from proxy.core.prefix import PrefixChain, prefix_chain
from proxy.core.responses import Responses
from proxy.core.routes import PromptKind, find_route
from proxy.core.scan import scan_body
from proxy.core.usage import Usage, read_usage
from proxy.errors import Dialect
from tests.core.builders import chain as prompt
from tests.core.builders import pool, replica

Call = Callable[[], object]
KB = (1, 16, 128)
REPLICAS = (8, 64, 512)
CHUNKS = 64  # of a burst

REQUEST_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate"
    b"\r\nConnection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    b"User-Agent: OpenAI/Python 3.57.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Async: false\r\n"
    b"X-Stainless-Retry-Count: 0\r\nAuthorization: Bearer none\r\nContent-Length: 1024"
)
RESPONSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 26 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked"
)
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE_TAIL = (b'{"choices":[{"message":{"content":"' + b"word " * 300 + b'"}}],"usage":') + (
    b'{"prompt_tokens":1500,"total_tokens":1600,"completion_tokens":100,'
    b'"prompt_tokens_details":{"cached_tokens":1024}}}'
)
FLAT_ERROR = b'{"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}'
REQUEST_ID = b"req-0123456789abcdef"


class Case(msgspec.Struct, frozen=True):
    """One row."""

    function: str
    size: str
    make: Callable[[], Call]


def chat_body(kilobytes: int) -> bytes:
    """Return a conversation of about so many KB: a system prompt, then turns."""
    messages = [{"role": "system", "content": "You are brief, and you cite what you were given."}]
    turn = 0
    while len(json.dumps(messages)) < kilobytes * 1024 - 200:
        role = "assistant" if turn % 2 else "user"
        messages.append({"role": role, "content": f'Turn {turn}: "quoted" text.\n' + "word " * 90})
        turn += 1
    return json.dumps({"model": "m", "messages": messages, "stream": True}).encode()


def chain_of(kilobytes: int) -> PrefixChain:
    return prefix_chain(PromptKind.CHAT, scan_body(chat_body(kilobytes)), None)


def scan(kilobytes: int) -> Call:
    body = chat_body(kilobytes)
    return lambda: scan_body(body)


def chain(kilobytes: int) -> Call:
    scanned = scan_body(chat_body(kilobytes))
    return lambda: prefix_chain(PromptKind.CHAT, scanned, None)


def note(kilobytes: int) -> Call:
    """A prompt that was used before, longer ago than what is young."""
    index, noted = Index(), chain_of(kilobytes)
    index.open(0, 4 * limits.KV_CAPACITY_TOKENS_DEFAULT)

    def renewed() -> object:
        index.renew()
        return index.note(0, noted)

    return renewed


def note_young(kilobytes: int) -> Call:
    """A prompt that was used just now."""
    index, noted = Index(), chain_of(kilobytes)
    index.open(0, 4 * limits.KV_CAPACITY_TOKENS_DEFAULT)
    return lambda: index.note(0, noted)


def hold_lease() -> Call:
    """A request's load, from its dispatch to its end, beside fifteen others."""
    picture, used = Picture(), chain_of(16)
    candidates = pool(replica(f"replica-{number}") for number in range(8))
    picture.know(candidates.replicas.values())
    replicas, usage = list(candidates.replicas.values()), Usage(4000, 100, 2000)
    held = [
        picture.acquire(replicas[number % 8], used, cached_octets=0, now_s=0.0)
        for number in range(15)
    ]
    turn = 0

    def hold() -> None:
        nonlocal turn
        turn += 1
        now_s = 0.01 * turn
        held.append(picture.acquire(replicas[turn % 8], used, cached_octets=8192, now_s=now_s))
        ended = held.pop(0)
        picture.prefill_ended(ended, now_s)
        picture.release(ended, now_s, usage)

    return hold


def upstream_head() -> Call:
    preamble = read_preamble(REQUEST_HEAD)
    host = b"Host: 127.0.0.1:30000\r\n"
    return lambda: preamble.upstream_head(host, REQUEST_ID, 1024)


def client_head() -> Call:
    head = heads.read_answer_head(RESPONSE_HEAD)
    framing = b"transfer-encoding: chunked\r\n"
    return lambda: heads.client_head(head, REQUEST_ID, framing=framing, keep_alive=True)


def pick(replicas: int) -> Call:
    """A choice for a prompt of 16 KB that one replica has; none is idle."""
    names = [f"replica-{number:03}" for number in range(replicas)]
    candidates = pool(replica(name) for name in names)
    picture, wanted = Picture(), chain_of(16)
    picture.know(candidates.replicas.values())
    for number, name in enumerate(names):
        found = candidates.replicas[name]
        picture.acquire(found, prompt(number, 400 * number), cached_octets=0, now_s=0.0)
        for other in range(4):
            picture.index.note(picture.slots[name], chain_of(1 + other))
    picture.index.note(picture.slots[names[replicas // 2]], wanted)
    request = Request(wanted, has_session=False)
    policy = POLICIES["prefix"]
    return lambda: policy(request, candidates, picture, 0.0)


def write_notes() -> Call:
    lease, points = notes.OpenLease(1, 2, 4000, 0, 16000, stream=True, weight=1.0), chain_of(16)
    usage = Usage(4000, 100, 2000)

    def write() -> bytes:
        sent = note_wire.write_dispatched(lease, points)
        return sent + note_wire.write_prefill_ended(1) + note_wire.write_released(1, usage)

    return write


def hear_notes() -> Call:
    """What another worker told of one request, from its dispatch to its end."""
    picture = Picture()
    picture.know([replica("replica-0")])
    hearsay = Hearsay(picture, Responses())
    hearsay.know(picture.slots)
    lease = notes.OpenLease(
        1, notes.replica_key("replica-0"), 4000, 0, 16000, stream=True, weight=1.0
    )
    batch = note_wire.write_dispatched(lease, chain_of(16)) + note_wire.write_prefill_ended(1)
    batch += note_wire.write_released(1, Usage(4000, 100, 2000))
    return lambda: hearsay.hear(1, batch, 0.0)


def follow_burst() -> Call:
    burst = b"".join(b"%x\r\n%b\r\n" % (len(EVENT), EVENT) for _ in range(CHUNKS))
    follower = ChunkFollower()
    return lambda: follower.feed(burst)


def follow_pieces() -> Call:
    piece = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    follower = ChunkFollower()
    return lambda: follower.feed(piece)


def _sized(function: str, make: Callable[[int], Call]) -> Iterable[Case]:
    for size in KB:
        yield Case(function, f"{size} KB", lambda size=size: make(size))  # type: ignore[misc]


CASES: tuple[Case, ...] = (
    Case("parse_request_head", "11 fields", lambda: lambda: parse_request_head(REQUEST_HEAD)),
    Case("read_preamble", "11 fields", lambda: lambda: read_preamble(REQUEST_HEAD)),
    Case("parse_response_head", "4 fields", lambda: lambda: parse_response_head(RESPONSE_HEAD)),
    Case("read_answer_head", "4 fields", lambda: lambda: heads.read_answer_head(RESPONSE_HEAD)),
    Case("find_route", "chat", lambda: lambda: find_route(b"POST", b"/v1/chat/completions")),
    *_sized("scan_body", scan),
    *_sized("prefix_chain", chain),
    *_sized("note, old", note),
    *_sized("note, young", note_young),
    Case("acquire..release", "of 16", hold_lease),
    *(
        Case("policy prefix", f"{count} replicas", lambda count=count: pick(count))  # type: ignore[misc]
        for count in REPLICAS
    ),
    Case("write notes", "a request", write_notes),
    Case("hear notes", "a request", hear_notes),
    Case("upstream_head", "11 fields", upstream_head),
    Case("client_head", "4 fields", client_head),
    Case("ChunkFollower.feed", f"{CHUNKS} chunks", follow_burst),
    Case("ChunkFollower.feed", "1 chunk", follow_pieces),
    Case("read_usage", "2 KB tail", lambda: lambda: read_usage(USAGE_TAIL[-2048:])),
    Case(
        "client_body",
        "flat error",
        lambda: lambda: client_body(400, b"application/json", FLAT_ERROR, Dialect.OPENAI),
    ),
)
