"""What must hold of any octets whatever, one law a target.

The oracle is the same everywhere: a verdict, or the one class of error; never another exception.
Beyond that each law says what the verdict must agree with. A law raises `AssertionError`; what a
reader raises of its own is a crash.
"""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any, Final

from proxy import errors
from proxy.core import limits, media, peer_wire, scan
from proxy.core.chunked import BadResponse, ChunkFollower
from proxy.core.hearsay import Hearsay
from proxy.core.picture import Picture
from proxy.core.prefix import prefix_chain
from proxy.core.responses import Responses
from proxy.core.routes import ROUTES, PromptKind, find_route, model_of_path
from proxy.core.scan import Scanned, scan_body
from proxy.core.sse import error_ending
from proxy.core.usage import read_usage
from tests.conformance.differential import compare_answers, compare_requests
from tests.conformance.reader import Verdict, cut_at, read_requests, read_response
from tests.core.builders import replica

COUNT_MAX: Final = 1 << 40
_ERROR: Final = b'{"error":{"message":"replica lost"}}'


def _pieces(octets: bytes) -> list[list[bytes]]:
    """Return three ways to cut some octets that depend on nothing but themselves."""
    place = sum(octets[:64]) % (len(octets) + 1)
    return [
        cut_at(octets, [place]),
        cut_at(octets, range(0, len(octets), 1 + place % 7)),
        cut_at(octets, range(place, len(octets), 64)),
    ]


# --- HTTP -----------------------------------------------------------------------------------------


def requests(octets: bytes) -> None:
    """One verdict however the octets are cut, and h11 agrees with whatever is taken."""
    whole = read_requests([octets])
    for pieces in _pieces(octets):
        _same_requests(read_requests(pieces), whole)
    assert not compare_requests(octets).difference


def _same_requests(got: Verdict, whole: Verdict) -> None:
    assert got.taken == whole.taken
    # Two faults in one head may be met in another order; refused it is, and sooner or as soon.
    assert bool(got.refused) >= bool(whole.refused)
    assert whole.waiting or bool(got.refused) == bool(whole.refused)


def answers(octets: bytes) -> None:
    """One verdict however the octets are cut, and h11 agrees with whatever is taken."""
    whole = read_response([octets])
    for pieces in _pieces(octets):
        got = read_response(pieces)
        assert got.failed == whole.failed
        if not whole.failed:
            assert got == whole
        else:
            assert (got.status, got.ended) == (whole.status, whole.ended)
    assert not compare_answers(octets).difference


def routes(path: bytes) -> None:
    """A path that goes to an engine is one of the list or one response's, and nothing else."""
    for method in (b"GET", b"POST", b"DELETE"):
        try:
            route = find_route(method, path)
        except errors.ProxyError:
            continue
        model_of_path(path).decode("ascii")
        if not route.local and path not in ROUTES:
            plain = path.removeprefix(b"/v1/responses/").removesuffix(b"/cancel")
            assert plain
            assert not plain.translate(None, b"-_").strip(
                b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
            )
            assert path.startswith(b"/v1/responses/")


# --- bodies ---------------------------------------------------------------------------------------


def _loads(octets: bytes) -> Any:
    # Numbers of any length are numbers; Python alone bounds their digits.
    return json.loads(octets, parse_int=lambda digits: (digits,))


def body(octets: bytes) -> None:
    """What is taken, `json.loads` reads alike: model, stream, tier, session and the prompt."""
    try:
        scanned = scan_body(octets)
    except errors.ProxyError:
        return
    value = _loads(octets)
    assert scanned.model == value["model"]
    assert value.get("stream") in (None, True, False)
    assert bool(scanned.stream) is bool(value.get("stream"))
    for name in ("service_tier", "prompt_cache_key", "cache_salt"):
        assert getattr(scanned, name) == value.get(name)
    for name in ("session_id", "lora_path", "previous_response_id"):
        given = value.get(name)
        assert getattr(scanned, name) == (given if isinstance(given, str) else None)
    names = ("messages", "prompt", "tools", "system", "instructions")
    for index, name in enumerate(names):  # as `scan.MESSAGES` and those after it
        part = scanned.part(index)
        assert bool(part) is (name in value)
        if part:
            assert _loads(part) == value[name]
    _ends(scanned, scan.MESSAGES, scanned.message_ends, value.get("messages"))
    _ends(scanned, scan.INPUT, scanned.input_ends, value.get("input"))
    _media(scanned)


def _media(scanned: Scanned) -> None:
    """Each region is within one part and between quotes, and no two lie over each other."""
    spans, regions = scanned.spans, scanned.media
    inside = [(begin, end) for begin, end in zip(spans[::2], spans[1::2], strict=True) if end]
    known: dict[tuple[int, int], int] = {}
    for at in range(0, len(regions), 4):
        start, end, size, strings = regions[at : at + 4]
        (span,) = [span for span in inside if span[0] < start <= end < span[1]]
        assert known.get(span, 0) < start
        known[span] = end
        if strings == 1:
            assert len(_loads(scanned.octets[start - 1 : end + 1])) <= size
        assert strings * media.WEIGHT_BYTES <= size <= end - start
    assert scanned.media_bytes <= sum(end - begin for begin, end in inside)
    assert len(regions) <= 4 * limits.MEDIA_REGIONS_MAX * len(inside)


def _ends(scanned: Scanned, part: int, ends: tuple[int, ...], value: object) -> None:
    """Each is where one of the last elements ends; only an array has any."""
    elements = value if isinstance(value, list) else []
    assert len(ends) == min(len(elements), limits.CHAIN_BOUNDARIES_MAX)
    begin = scanned.spans[2 * part]
    for left, end in enumerate(reversed(ends)):
        read = _loads(scanned.octets[begin:end] + b"]")
        assert read == elements[: len(elements) - left]


def chain(octets: bytes) -> None:
    """A chain is the same each time, names growing prefixes, and ends where the prompt does."""
    scanned = _scanned(octets)
    if scanned is None:
        return
    for kind in PromptKind:
        first = prefix_chain(kind, scanned, None)
        ends = list(first.ends)
        assert ends == sorted(ends if scanned.media else set(ends))
        assert len(ends) == len(first.hashes)
        assert not ends or ends[-1] == first.prompt_bytes
        assert all(0 <= name < 1 << 64 for name in (first.home_key, *first.hashes))
        again = prefix_chain(kind, scanned, b"a session")
        assert list(again.hashes) == list(first.hashes)


def _scanned(octets: bytes) -> Scanned | None:
    """Take the octets for a body or, failing that, for the messages of one."""
    for text in (octets, b'{"model":"m","messages":' + octets + b"}"):
        try:
            return scan_body(text)
        except errors.ProxyError:
            continue
    return None


# --- answers' contents ----------------------------------------------------------------------------


def usage(octets: bytes) -> None:
    """Counts are whole numbers of a sane size, or there are none."""
    got = read_usage(octets)
    if got is not None:
        assert 0 <= got.prompt_tokens <= COUNT_MAX
        assert 0 <= got.completion_tokens <= COUNT_MAX
        assert got.cached_tokens is None or 0 <= got.cached_tokens <= COUNT_MAX


def event_stream(octets: bytes) -> None:
    """Cut anywhere, a reader gets the events that were whole, and the error only after them.

    The first octets choose the cut and the sizes of the chunks; the rest is the stream.
    """
    choice, stream = octets[:6], octets[6:]
    if len(choice) < 6:
        return
    (cut,), sizes = struct.unpack(">H", choice[:2]), [1 + size for size in choice[2:]]
    wire = b""
    at = 0
    while at < len(stream):
        piece = stream[at : at + sizes[at % 4]]
        wire += b"%x\r\n%b\r\n" % (len(piece), piece)
        at += len(piece)
    wire = wire[: cut % (len(wire) + 1)]
    follower = ChunkFollower()
    try:
        relayed, _ = follower.feed(wire)
    except BadResponse as error:
        raise AssertionError(wire) from error
    added = error_ending(relayed, follower.chunk_left, b"data: " + _ERROR + b"\n\n")
    seen = _events(_data(relayed + added))
    if added:
        assert seen.pop() == _ERROR
    assert seen == _events(stream)[: len(seen)]


def _data(chunks: bytes) -> bytes:
    """Undo chunk framing as far as it goes."""
    data, at = b"", 0
    while (line_end := chunks.find(b"\r\n", at)) >= 0:
        size = int(chunks[at:line_end], 16)
        data += chunks[line_end + 2 : line_end + 2 + size]
        at = line_end + 2 + size + 2
    return data


def _events(stream: bytes) -> list[bytes]:
    """Return the data of each whole event, as the WHATWG specification reads a stream."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events: list[bytes] = []
    data: list[bytes] = []
    for line in lines[:-1]:
        name, _, value = line.partition(b":")
        if not line and data:
            events.append(b"\n".join(data))
        if not line:
            data = []
        elif name == b"data":
            data.append(value.removeprefix(b" "))
    return events


# --- other proxies --------------------------------------------------------------------------------


def heard(octets: bytes) -> None:
    """Whatever a peer says, nothing is held for it once it has gone."""
    picture = Picture()
    picture.know([replica("a"), replica("b")])
    hearsay = Hearsay(picture, Responses())
    hearsay.know(picture.slots)
    hearsay.hear(1, octets, 1.0)
    assert hearsay.leases() <= len(octets)
    hearsay.forget(1, 2.0)
    assert hearsay.leases() == 0
    assert picture.loads.inflight[:2] == [0, 0]
    assert picture.loads.held_tokens[:2] == [0, 0]


def peers(octets: bytes) -> None:
    """A hello or a frame, or a refusal."""
    for read in (peer_wire.read_frame, lambda said: peer_wire.read_hello(said, "local", None)):
        with contextlib.suppress(peer_wire.WireError):
            read(octets)
