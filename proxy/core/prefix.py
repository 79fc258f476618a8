"""A request's prefix chain: a key that names its conversation, and hashes of growing prefixes.

Computed from the raw octets of the prompt, without tokenizer or JSON objects. Two requests whose
prompts begin with the same octets share the beginning of the chain, whatever else their bodies hold
and in whatever order: each part (tools, system, messages …) is hashed on its own, in a fixed order.
What makes a cached prefix unusable for another request (model, adapter, salt) seeds the chain.

The *opener* (tools, system and the first user message) names the conversation: turn n+1 repeats it
octet for octet, so it comes to where turn n was, with no session id. A head that everybody shares
never decides alone, because the first user message is always part of the opener.

Depths grow by half from 512 octets: n octets cost O(log n) hashes over n octets in all.
The derivation is versioned: proxies that disagree on it would place the same prompt differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from xxhash import xxh3_64_intdigest

from proxy.core import limits, scan
from proxy.core.routes import PromptKind
from proxy.core.scan import Scanned

CHAIN_VERSION: Final = b"1"

_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_SPACE: Final = b" \t\r\n"
_STRUCTURAL: Final = re.compile(rb'["\[\]{}]')
# A tuple, because members of an Enum are hashed by Python code and compared without.
_WITH_MESSAGES: Final = (PromptKind.CHAT, PromptKind.ANTHROPIC, PromptKind.RESPONSES)
_SEEDS_MAX: Final = 1024
_HEAD_NONE: Final[tuple[int, ...]] = ()
_HEAD_CHAT: Final[tuple[int, ...]] = (scan.TOOLS,)
_HEAD_RESPONSES: Final[tuple[int, ...]] = (scan.TOOLS, scan.INSTRUCTIONS)
_HEAD_ANTHROPIC: Final[tuple[int, ...]] = (scan.TOOLS, scan.SYSTEM)
_INPUT_PARTS: Final[tuple[int, ...]] = (
    scan.QUERY, scan.INPUT, scan.DOCUMENTS, scan.TEXT_1, scan.MESSAGES, scan.PROMPT,
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
    """`home_key` places the request on the ring; `hashes[i]` names its first `ends[i]` octets."""

    __slots__ = ("ends", "hashes", "home_key", "prompt_bytes")

    def __init__(
        self, home_key: int, hashes: Sequence[int], ends: Sequence[int], prompt_bytes: int
    ) -> None:
        self.home_key = home_key
        self.hashes = hashes
        self.ends = ends
        self.prompt_bytes = prompt_bytes

    @property
    def prompt_tokens(self) -> int:
        """An estimate, good to a third for text."""
        return self.prompt_bytes // limits.BYTES_PER_TOKEN


NO_CHAIN: Final = PrefixChain(0, (), (), 0)


def prefix_chain(kind: PromptKind, scanned: Scanned, session_key: bytes | None) -> PrefixChain:
    """Return the chain of one request. A session key stands in for the opener."""
    names = _seed(scanned.model, scanned.lora_path or "", scanned.cache_salt or "")
    seed = names
    head, octets, begin, end = _prompt_parts(kind, scanned)
    view = memoryview(octets)
    head_bytes = 0
    for part in head:
        first, last = scanned.spans[2 * part], scanned.spans[2 * part + 1]
        if first < last:
            seed = xxh3_64_intdigest(view[first:last], seed)
            head_bytes += last - first
    hashes: list[int] = [seed] if head_bytes else []
    ends: list[int] = [head_bytes] if head_bytes else []
    # The closing bracket or quote of a prompt that will grow is not part of its prefix.
    last = max(begin, end - 1)
    if last > begin and octets[last - 1] in _SPACE:  # nor is the space before it
        before = octets[max(begin, last - limits.SPACE_BYTES_MAX) : last]
        last -= len(before) - len(before.rstrip(_SPACE))
    size = last - begin
    rolling = seed
    start = 0
    for depth in DEPTHS:
        if depth > size:
            break
        rolling = xxh3_64_intdigest(view[begin + start : begin + depth], rolling)
        hashes.append(rolling)
        ends.append(head_bytes + depth)
        start = depth
    if size > start:
        hashes.append(xxh3_64_intdigest(view[begin + start : last], rolling))
        ends.append(head_bytes + size)
    if session_key is not None:
        home_key = xxh3_64_intdigest(session_key, names)
    else:
        opener_end = begin + limits.OPENER_BYTES_MAX
        if kind in _WITH_MESSAGES:
            opener_end = _find_opener_end(
                octets, begin, end, limits.OPENER_SEARCH_BYTES_MAX, limits.OPENER_BYTES_MAX
            )
        home_key = xxh3_64_intdigest(view[begin : min(opener_end, end)], seed)
    return PrefixChain(home_key, hashes, ends, head_bytes + size)


def _seed(model: str, adapter: str, salt: str) -> int:
    if len(adapter) + len(salt) > limits.SESSION_KEY_BYTES_MAX:  # as long as a client likes
        return _fresh_seed(model, adapter, salt)
    return _known_seed(model, adapter, salt)


@lru_cache(_SEEDS_MAX)
def _known_seed(model: str, adapter: str, salt: str) -> int:
    return _fresh_seed(model, adapter, salt)


def _fresh_seed(model: str, adapter: str, salt: str) -> int:
    names = (model, adapter, salt)
    # Lengths first: no text inside one name may stand for the border between two.
    lengths = ",".join([str(len(name)) for name in names]) + ";"
    # surrogatepass: JSON may hold a lone surrogate, and a key only has to be the same each time.
    text = (lengths + "".join(names)).encode("utf-8", "surrogatepass")
    return xxh3_64_intdigest(CHAIN_VERSION + text)


def _prompt_parts(kind: PromptKind, scanned: Scanned) -> tuple[tuple[int, ...], bytes, int, int]:
    """Return the parts that lead the prompt; and the part that grows: octets, begin, end."""
    head, grows = _HEAD_NONE, scan.PROMPT
    match kind:
        case PromptKind.CHAT:
            head, grows = _HEAD_CHAT, scan.MESSAGES
        case PromptKind.COMPLETION:
            pass
        case PromptKind.RESPONSES:
            head, grows = _HEAD_RESPONSES, scan.INPUT
        case PromptKind.ANTHROPIC:
            head, grows = _HEAD_ANTHROPIC, scan.MESSAGES
        case PromptKind.INPUT:
            octets = b"".join([scanned.part(part) for part in _INPUT_PARTS])
            return _HEAD_NONE, octets, 0, len(octets)
        case PromptKind.OPAQUE:
            return _HEAD_NONE, b"", 0, 0
    return head, scanned.octets, scanned.spans[2 * grows], scanned.spans[2 * grows + 1]


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
            at = _string_end(rest, len(usual))
            if at >= 0 and rest[at : at + 1] == b"}":
                return at + 1
    depth = 1
    at = 0
    while (found := _STRUCTURAL.search(rest, at)) is not None:
        at = found.end()
        octet = rest[at - 1]
        if octet == _QUOTE:
            at = _string_end(rest, at)
            if at < 0:
                return -1
        elif octet in b"{[":
            depth += 1
        else:
            depth -= 1
            if not depth:
                return at
    return -1


def _string_end(data: bytes, at: int) -> int:
    """Return the index after the string whose text begins at `at`, or -1."""
    while (at := data.find(b'"', at)) >= 0:
        back = at - 1
        while data[back] == _BACKSLASH:
            back -= 1
        at += 1
        if (at - back) & 1 == 0:  # an even number of backslashes before the quote
            return at
    return -1


_find_opener_end: Callable[[bytes, int, int, int, int], int]
try:
    from proxy.core._scan import opener_end as _find_opener_end
except ImportError:
    _find_opener_end = _opener_end
