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
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from msgspec import Raw
from xxhash import xxh3_64_intdigest

from proxy.core import limits
from proxy.core.routes import PromptKind
from proxy.core.scan import Scanned

CHAIN_VERSION: Final = b"1"

_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_SPACE: Final = b" \t\r\n"
_STRUCTURAL: Final = re.compile(rb'["\[\]{}]')
_WITH_MESSAGES: Final = frozenset((PromptKind.CHAT, PromptKind.ANTHROPIC, PromptKind.RESPONSES))
_SEEDS_MAX: Final = 1024
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
    head, tail = _prompt_parts(kind, scanned)
    head_bytes = 0
    for part in head:
        if part:
            seed = xxh3_64_intdigest(part, seed)
            head_bytes += len(part)
    hashes: list[int] = [seed] if head_bytes else []
    ends: list[int] = [head_bytes] if head_bytes else []
    octets = memoryview(tail)
    # The closing bracket or quote of a prompt that will grow is not part of its prefix.
    size = max(0, len(octets) - 1)
    if size and octets[size - 1] in _SPACE:  # nor is the space before it
        before = bytes(octets[max(0, size - limits.SPACE_BYTES_MAX) : size])
        size -= len(before) - len(before.rstrip(_SPACE))
    rolling = seed
    start = 0
    for depth in DEPTHS:
        if depth > size:
            break
        rolling = xxh3_64_intdigest(octets[start:depth], rolling)
        hashes.append(rolling)
        ends.append(head_bytes + depth)
        start = depth
    if size > start:
        hashes.append(xxh3_64_intdigest(octets[start:size], rolling))
        ends.append(head_bytes + size)
    if session_key is not None:
        home_key = xxh3_64_intdigest(session_key, names)
    else:
        opener_bytes = limits.OPENER_BYTES_MAX
        if kind in _WITH_MESSAGES:
            opener_bytes = _opener_end(octets)
        home_key = xxh3_64_intdigest(octets[:opener_bytes], seed)
    return PrefixChain(home_key, hashes, ends, head_bytes + size)


@lru_cache(_SEEDS_MAX)
def _seed(model: str, adapter: str, salt: str) -> int:
    names = (model, adapter, salt)
    # Lengths first: no text inside one name may stand for the border between two.
    lengths = ",".join([str(len(name)) for name in names]) + ";"
    # surrogatepass: JSON may hold a lone surrogate, and a key only has to be the same each time.
    text = (lengths + "".join(names)).encode("utf-8", "surrogatepass")
    return xxh3_64_intdigest(CHAIN_VERSION + text)


def _prompt_parts(kind: PromptKind, scanned: Scanned) -> tuple[tuple[Raw, ...], Raw]:
    """Return the parts that lead the prompt, and the part that grows."""
    match kind:
        case PromptKind.CHAT:
            return (scanned.tools,), scanned.messages
        case PromptKind.COMPLETION:
            return (), scanned.prompt
        case PromptKind.RESPONSES:
            return (scanned.tools, scanned.instructions), scanned.input
        case PromptKind.ANTHROPIC:
            return (scanned.tools, scanned.system), scanned.messages
        case PromptKind.INPUT:
            parts = (scanned.query, scanned.input, scanned.documents, scanned.text_1)
            return (), Raw(b"".join((*parts, scanned.messages, scanned.prompt)))
        case PromptKind.OPAQUE:
            return (), Raw()


def _opener_end(messages: memoryview) -> int:
    """Return where the opener ends: with the first user message, or after a bounded beginning."""
    window = bytes(messages[: 2 * limits.OPENER_BYTES_MAX])
    found = _user_role(window)
    if found < 0 and len(messages) > len(window):
        window = bytes(messages[: limits.OPENER_SEARCH_BYTES_MAX])
        found = _user_role(window)
    if found < 0:
        return limits.OPENER_BYTES_MAX
    longest = found + limits.OPENER_BYTES_MAX
    end = _object_end(bytes(messages[found:longest]))
    return longest if end < 0 else found + end


def _user_role(messages: bytes) -> int:
    """Return the end of the first `"role": "user"`, or -1.

    A search is enough, because the octets are JSON that was checked: within a string every quote
    is escaped, so a quote without a backslash before it opens a string that is just this word.
    """
    at = messages.find(b'"user"')
    while at >= 0:
        if messages[max(0, at - 9) : at].endswith(_USUAL_BEFORE_USER):
            return at + 6
        before = messages[max(0, at - 40) : at].rstrip(_SPACE)
        if before.endswith(b":"):
            before = before[:-1].rstrip(_SPACE)
            if before.endswith(b'"role"') and not before.endswith(b'\\"role"'):
                return at + 6
        at = messages.find(b'"user"', at + 6)
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
