"""A request's prefix chain: a key that names its conversation, and hashes of growing prefixes.

Computed from the raw octets of the prompt, without tokenizer or JSON objects. Two requests whose
prompts begin with the same octets share the beginning of the chain, whatever else their bodies hold
and in whatever order: the parts (tools, system, messages …) are hashed in a fixed order. What makes
a cached prefix unusable for another request (model, adapter, salt, tenant) seeds the chain.

A hash depends on the octets before its point and on nothing else, above all not on where the other
points lie. So every point that two chains have in common is known to both, and points may be put
where they are worth most: at depths that grow by half, which any two prompts have in common, and
where the last messages end, because that is where the turn before ended and the next one goes on.

The *opener* (tools, system and the first user message) names the conversation: turn n+1 repeats it
octet for octet, so it comes to where turn n was, with no session id. A head that everybody shares
never decides alone, because the first user message is always part of the opener.

Depths grow by half from 512 octets: n octets cost O(log n) hashes, and are read once.
The derivation is versioned: proxies that disagree on it would place the same prompt differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from xxhash import xxh3_64, xxh3_64_intdigest

from proxy.core import limits, scan
from proxy.core.media import placed, string_end, weighed
from proxy.core.routes import PromptKind
from proxy.core.scan import Scanned

CHAIN_VERSION: Final = b"2"

_QUOTE: Final = 0x22
_SPACE: Final = b" \t\r\n"
_STRUCTURAL: Final = re.compile(rb'["\[\]{}]')
# A tuple, because members of an Enum are hashed by Python code and compared without.
_CHAT: Final = PromptKind.CHAT  # looked up once: every request asks
_RESPONSES: Final = PromptKind.RESPONSES
_ANTHROPIC: Final = PromptKind.ANTHROPIC
_INPUT: Final = PromptKind.INPUT
_OPAQUE: Final = PromptKind.OPAQUE
_WITH_MESSAGES: Final = (_CHAT, _ANTHROPIC, _RESPONSES)
_SEEDS_MAX: Final = 1024
_HEAD_NONE: Final[tuple[int, ...]] = ()
_NO_BOUNDARIES: Final[tuple[int, ...]] = ()
_HEAD_CHAT: Final[tuple[int, ...]] = (scan.TOOLS,)
_HEAD_RESPONSES: Final[tuple[int, ...]] = (scan.TOOLS, scan.INSTRUCTIONS)
_HEAD_ANTHROPIC: Final[tuple[int, ...]] = (scan.TOOLS, scan.SYSTEM)
_INPUT_PARTS: Final[tuple[int, ...]] = (
    scan.QUERY, scan.INPUT, scan.DOCUMENTS, scan.TEXT_1, scan.MESSAGES, scan.PROMPT, scan.INPUT_IDS,
)  # fmt: skip
_USUAL_BEFORE_USER: Final[tuple[bytes, ...]] = (b'{"role":', b'{"role": ')
_USUAL_AFTER_USER: Final[tuple[bytes, ...]] = (b',"content":"', b', "content": "')


def _growing_depths() -> tuple[int, ...]:
    depths: list[int] = []
    depth = limits.CHAIN_FIRST_BYTES
    while len(depths) < limits.CHAIN_DEPTHS_MAX:
        depths.append(depth)
        depth += max(limits.CHAIN_FIRST_BYTES, depth // 2 // 64 * 64)
    return tuple(depths)


DEPTHS: Final = _growing_depths()


class PrefixChain:
    """`home_key` places the request on the ring; `hashes[i]` names the prompt up to `ends[i]`.

    Ends and `prompt_bytes` are for load: octets, of which a picture has as many as it weighs.
    """

    __slots__ = ("ends", "hashes", "home_key", "prompt_bytes")

    def __init__(
        self, home_key: int, hashes: Sequence[int], ends: Sequence[int], prompt_bytes: int
    ) -> None:
        self.home_key = home_key
        self.hashes = hashes
        self.ends = ends
        self.prompt_bytes = prompt_bytes


NO_CHAIN: Final = PrefixChain(0, (), (), 0)


def prefix_chain(
    kind: PromptKind, scanned: Scanned, session_key: bytes | None, tenant: bytes = b""
) -> PrefixChain:
    """Return the chain of one request. A session key stands in for the opener."""
    names = _seed(scanned.model, scanned.lora_path or "", scanned.cache_salt or "", tenant)
    seed = names
    if kind is _RESPONSES and scanned.previous_response_id:
        # The engine puts that answer and all before it in front of this prompt.
        before = scanned.previous_response_id.encode("utf-8", "surrogatepass")
        seed = xxh3_64_intdigest(before, names)
    head, octets, begin, end, boundaries = _prompt_parts(kind, scanned)
    head_bytes = 0
    for part in head:
        first, last = scanned.spans[2 * part], scanned.spans[2 * part + 1]
        if first < last:
            seed = xxh3_64_intdigest(_piece(octets, first, last), seed)
            head_bytes += last - first
    hashes: list[int] = [seed] if head_bytes else []
    ends: list[int] = [head_bytes] if head_bytes else []
    last = boundaries[-1] if boundaries else _text_end(octets, begin, end)
    if not boundaries and kind is not _INPUT:
        boundaries = _steps(begin, last)
    _hash_on(octets, begin, _points(begin, last, boundaries), seed, hashes, ends)
    if session_key is not None:
        home_key = xxh3_64_intdigest(session_key, names)
    else:
        opener_end = begin + limits.OPENER_BYTES_MAX
        if kind in _WITH_MESSAGES:
            opener_end = _find_opener_end(
                octets, begin, end, limits.OPENER_SEARCH_BYTES_MAX, limits.OPENER_BYTES_MAX
            )
        home_key = xxh3_64_intdigest(_piece(octets, begin, min(opener_end, end)), seed)
    prompt_bytes = head_bytes + last - begin
    if scanned.media:
        regions = placed(scanned.media, _spans(kind, scanned, head, begin, end))
        *ends, prompt_bytes = weighed([*ends, prompt_bytes], regions)
    return PrefixChain(home_key, hashes, ends, prompt_bytes)


def _piece(octets: bytes, begin: int, end: int) -> bytes | memoryview:
    """Return octets to hash. A few are copied, which costs less than a view of them."""
    if end - begin <= limits.PIECE_COPIED_BYTES_MAX:
        return octets[begin:end]
    return memoryview(octets)[begin:end]


def _hash_on(
    octets: bytes, begin: int, points: list[int], seed: int, hashes: list[int], ends: list[int]
) -> None:
    """Append the hash of `octets[begin:point]` for each point, and where that ends in the prompt.

    The prompt is what was hashed before, up to the last of `ends`, and these.
    """
    if not points:
        return
    before_bytes = (ends[-1] if ends else 0) - begin
    at = points[0]
    hasher = xxh3_64(_piece(octets, begin, at), seed)
    read, digest = hasher.update, hasher.intdigest
    for point in points:
        if point > at:
            read(_piece(octets, at, point))
            at = point
        hashes.append(digest())
        ends.append(before_bytes + point)


def _spans(
    kind: PromptKind, scanned: Scanned, head: tuple[int, ...], begin: int, end: int
) -> list[tuple[int, int]]:
    """Return where in the body the prompt lies, in the order in which it is hashed."""
    parts = _INPUT_PARTS if kind is _INPUT else head
    spans = [(scanned.spans[2 * part], scanned.spans[2 * part + 1]) for part in parts]
    return spans if kind is _INPUT else [*spans, (begin, end)]


def form_chain(
    model: str, body: bytes, begin: int, end: int, session_key: bytes | None, tenant: bytes = b""
) -> PrefixChain:
    """Return the chain of a form whose prompt is a file of sound, `body[begin:end]`: one prefix."""
    names = _seed(model, "", "", tenant)
    name = xxh3_64_intdigest(memoryview(body)[begin:end], names)
    home_key = name if session_key is None else xxh3_64_intdigest(session_key, names)
    if begin == end:
        return PrefixChain(home_key, (), (), 0)
    tokens = 1 + (end - begin) // limits.AUDIO_BYTES_PER_TOKEN
    size = tokens * limits.BYTES_PER_TOKEN
    return PrefixChain(home_key, (name,), (size,), size)


def _text_end(octets: bytes, begin: int, end: int) -> int:
    """Return where a prompt that may grow ends: before its closing bracket or quote, and space."""
    last = max(begin, end - 1)
    if last > begin and octets[last - 1] in _SPACE:
        before = octets[max(begin, last - limits.SPACE_BYTES_MAX) : last]
        last -= len(before) - len(before.rstrip(_SPACE))
    return last


def _steps(begin: int, last: int) -> tuple[int, ...]:
    """Return the last multiples of a step: where else to hash a prompt that has no messages.

    A step is a power of two, so that prompts of about one length step alike: text that has grown by
    no more than a quarter has a point in the last step of what it was.
    """
    step = limits.CHAIN_FIRST_BYTES
    while step * 4 * limits.CHAIN_STEPS_MAX <= last - begin:
        step *= 2
    whole = (last - begin) // step
    first = max(1, whole + 1 - limits.CHAIN_STEPS_MAX)
    return tuple([begin + step * number for number in range(first, whole + 1)])


def _points(begin: int, last: int, boundaries: tuple[int, ...]) -> list[int]:
    """Return where the prompt `begin` to `last` is hashed, in rising order: no point twice."""
    points: list[int] = []
    known = 0
    for depth in DEPTHS:
        point = begin + depth
        if point >= last:
            break
        while known < len(boundaries) and boundaries[known] < point:
            points.append(boundaries[known])
            known += 1
        if known < len(boundaries) and boundaries[known] == point:
            known += 1
        points.append(point)
    while known < len(boundaries) and boundaries[known] < last:
        points.append(boundaries[known])
        known += 1
    if last > begin:
        points.append(last)
    return points


def _seed(model: str, adapter: str, salt: str, tenant: bytes) -> int:
    if len(adapter) + len(salt) > limits.SESSION_KEY_BYTES_MAX:  # as long as a client likes
        return _fresh_seed(model, adapter, salt, tenant)
    return _known_seed(model, adapter, salt, tenant)


@lru_cache(_SEEDS_MAX)
def _known_seed(model: str, adapter: str, salt: str, tenant: bytes) -> int:
    return _fresh_seed(model, adapter, salt, tenant)


def _fresh_seed(model: str, adapter: str, salt: str, tenant: bytes) -> int:
    names = (model, adapter, salt, tenant.decode("latin-1"))
    # Lengths first: no text inside one name may stand for the border between two.
    lengths = ",".join([str(len(name)) for name in names]) + ";"
    # surrogatepass: JSON may hold a lone surrogate, and a key only has to be the same each time.
    text = (lengths + "".join(names)).encode("utf-8", "surrogatepass")
    return xxh3_64_intdigest(CHAIN_VERSION + text)


def _prompt_parts(
    kind: PromptKind, scanned: Scanned
) -> tuple[tuple[int, ...], bytes, int, int, tuple[int, ...]]:
    """Return the parts that lead the prompt; and the part that grows: octets, begin, end, ends.

    The last are where its last messages end.
    """
    head, grows, boundaries = _HEAD_NONE, scan.PROMPT, _NO_BOUNDARIES
    if kind is _CHAT:
        head, grows, boundaries = _HEAD_CHAT, scan.MESSAGES, scanned.message_ends
    elif kind is _RESPONSES:
        head, grows, boundaries = _HEAD_RESPONSES, scan.INPUT, scanned.input_ends
    elif kind is _ANTHROPIC:
        head, grows, boundaries = _HEAD_ANTHROPIC, scan.MESSAGES, scanned.message_ends
    elif kind is _INPUT:
        octets = b"".join([scanned.part(part) for part in _INPUT_PARTS])
        return _HEAD_NONE, octets, 0, len(octets), _NO_BOUNDARIES
    elif kind is _OPAQUE:
        return _HEAD_NONE, b"", 0, 0, _NO_BOUNDARIES
    spans = scanned.spans
    begin, end = spans[2 * grows], spans[2 * grows + 1]
    if begin == end:  # SGLang takes tokens in the place of messages or text
        begin, end = spans[2 * scan.INPUT_IDS], spans[2 * scan.INPUT_IDS + 1]
    return head, scanned.octets, begin, end, boundaries


def _opener_end(
    octets: bytes, begin: int, end: int, search_bytes_max: int, opener_bytes_max: int
) -> int:
    """Return where the opener ends: with the first user message, or after a bounded beginning.

    The messages are `octets[begin:end]`; what is returned may lie beyond them.
    """
    found = _user_role(octets, begin, min(end, begin + search_bytes_max))
    if found < 0:
        return begin + opener_bytes_max
    longest = found + opener_bytes_max
    closed = _object_end(octets[found : min(longest, end)])
    return longest if closed < 0 else found + closed


def _user_role(octets: bytes, begin: int, end: int) -> int:
    """Return the end of the first `"role": "user"` between two places, or -1.

    A search is enough, because the octets are JSON that was checked: within a string every quote
    is escaped, so a quote without a backslash before it opens a string that is just this word.
    """
    at = octets.find(b'"user"', begin, end)
    while at >= 0:
        if octets[max(begin, at - 9) : at].endswith(_USUAL_BEFORE_USER):
            return at + 6
        before = octets[max(begin, at - 40) : at].rstrip(_SPACE)
        if before.endswith(b":"):
            before = before[:-1].rstrip(_SPACE)
            if before.endswith(b'"role"') and not before.endswith(b'\\"role"'):
                return at + 6
        at = octets.find(b'"user"', at + 6, end)
    return -1


def _object_end(rest: bytes) -> int:
    """Return the index after the object that `rest` begins within, or -1; between two members."""
    for usual in _USUAL_AFTER_USER:  # as most clients write it; all else goes the long way
        if rest.startswith(usual):
            at = string_end(rest, len(usual))
            if at >= 0 and rest[at : at + 1] == b"}":
                return at + 1
    depth = 1
    at = 0
    while (found := _STRUCTURAL.search(rest, at)) is not None:
        at = found.end()
        octet = rest[at - 1]
        if octet == _QUOTE:
            at = string_end(rest, at)
            if at < 0:
                return -1
        elif octet in b"{[":
            depth += 1
        else:
            depth -= 1
            if not depth:
                return at
    return -1


_find_opener_end: Callable[[bytes, int, int, int, int], int]
try:
    from proxy.core._scan import opener_end as _find_opener_end
except ImportError:
    _find_opener_end = _opener_end
