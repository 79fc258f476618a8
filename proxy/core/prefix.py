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
from typing import Final

from xxhash import xxh3_64_intdigest

from proxy.core import limits
from proxy.core.routes import PromptKind
from proxy.core.scan import Scanned

CHAIN_VERSION: Final = b"1"

_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_STRING_OR_OBJECT: Final = re.compile(rb'["{]')
_SPACE: Final = b" \t\r\n"
_OPENING: Final = frozenset(b"[{")
_COMMA: Final = 0x2C
_STRUCTURAL: Final = re.compile(rb'["\[\]{}]')
_SCALAR_END: Final = re.compile(rb"[,}\] \t\r\n]")


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
        self, home_key: int, hashes: tuple[int, ...], ends: tuple[int, ...], prompt_bytes: int
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
    seed = _seed(scanned)
    head, tail = _prompt_parts(kind, scanned)
    for part in head:
        if part:
            seed = xxh3_64_intdigest(part, seed)
    head_bytes = sum(map(len, head))
    hashes: list[int] = [seed] if head_bytes else []
    ends: list[int] = [head_bytes] if head_bytes else []
    # The closing bracket or quote of a prompt that will grow is not part of its prefix.
    size = max(0, len(tail) - 1)
    if size and tail[size - 1] in _SPACE:  # nor is the space before it
        size = len(tail[:size].rstrip(_SPACE))
    rolling = seed
    start = 0
    for depth in DEPTHS:
        if depth > size:
            break
        rolling = xxh3_64_intdigest(tail[start:depth], rolling)
        hashes.append(rolling)
        ends.append(head_bytes + depth)
        start = depth
    if size > start:
        hashes.append(xxh3_64_intdigest(tail[start:size], rolling))
        ends.append(head_bytes + size)
    if session_key is not None:
        home_key = xxh3_64_intdigest(session_key, seed=_seed(scanned))
    else:
        home_key = xxh3_64_intdigest(tail[: _opener_end(kind, tail)], seed)
    return PrefixChain(home_key, tuple(hashes), tuple(ends), head_bytes + size)


def _seed(scanned: Scanned) -> int:
    names = (scanned.model, scanned.lora_path or "", scanned.cache_salt or "")
    # Lengths first: no text inside one name may stand for the border between two.
    lengths = ",".join(str(len(name)) for name in names) + ";"
    # surrogatepass: JSON may hold a lone surrogate, and a key only has to be the same each time.
    text = (lengths + "".join(names)).encode("utf-8", "surrogatepass")
    return xxh3_64_intdigest(CHAIN_VERSION + text)


def _prompt_parts(kind: PromptKind, scanned: Scanned) -> tuple[tuple[bytes, ...], bytes]:
    """Return the parts that lead the prompt, and the part that grows."""
    match kind:
        case PromptKind.CHAT:
            return (scanned.tools,), scanned.messages
        case PromptKind.COMPLETION:
            return (), scanned.prompt
        case PromptKind.RESPONSES:
            return (scanned.tools, scanned.instructions), scanned.parts[1]
        case PromptKind.ANTHROPIC:
            return (scanned.tools, scanned.system), scanned.messages
        case PromptKind.INPUT:
            return (), b"".join(scanned.parts) + scanned.messages + scanned.prompt
        case PromptKind.OPAQUE:
            return (), b""


def _opener_end(kind: PromptKind, tail: bytes) -> int:
    """Return where the opener ends: with the first user message, or after a bounded beginning."""
    start = _first_user_message(tail) if kind in _WITH_MESSAGES else None
    if start is None:
        return limits.OPENER_BYTES_MAX
    longest = start + limits.OPENER_BYTES_MAX
    try:
        return _object_end(tail[:longest], start)
    except ValueError:
        return longest


_WITH_MESSAGES: Final = frozenset((PromptKind.CHAT, PromptKind.ANTHROPIC, PromptKind.RESPONSES))


def _first_user_message(array: bytes) -> int | None:
    """Return where the first element whose role is user starts; None when there is none.

    Only a bounded beginning is searched: text that is nothing but quotes costs a step for each.
    """
    if not array.startswith(b"["):
        return None
    window = array[: limits.OPENER_SEARCH_BYTES_MAX]
    at = 1
    try:
        while (found := _STRING_OR_OBJECT.search(window, at)) is not None:
            start = found.start()
            if window[start] == _QUOTE:  # an element that is text, and may hold braces
                at = _string_end(window, start)
                continue
            if _role_is_user(window, start):
                return start
            at = _object_end(window, start)
    except (ValueError, IndexError):  # the window ends before the element does
        return None
    return None


def _role_is_user(array: bytes, start: int) -> bool:
    """Whether the object has `"role": "user"` at its own level; a `role` inside content is not.

    Like all below, raises `ValueError` or `IndexError` when the octets end before the object does.
    """
    at = _skip_space(array, start + 1)
    while array[at] == _QUOTE:
        key_end = _string_end(array, at)
        value_start = _skip_space(array, array.index(b":", key_end) + 1)
        value_end = _value_end(array, value_start)
        if array[at:key_end] == b'"role"':
            return array[value_start:value_end] == b'"user"'
        at = _skip_space(array, value_end)
        if array[at] == _COMMA:
            at = _skip_space(array, at + 1)
    return False


def _skip_space(data: bytes, at: int) -> int:
    while data[at] in _SPACE:
        at += 1
    return at


def _value_end(data: bytes, at: int) -> int:
    first = data[at]
    if first == _QUOTE:
        return _string_end(data, at)
    if first in _OPENING:
        return _object_end(data, at)
    found = _SCALAR_END.search(data, at)
    if found is None:
        raise ValueError("the octets end within a number or a word")
    return found.start()


def _string_end(data: bytes, quote: int) -> int:
    """Return the index after the string that opens at `quote`; `data` is valid JSON."""
    at = quote + 1
    while True:
        at = data.index(b'"', at)
        back = at - 1
        while data[back] == _BACKSLASH:
            back -= 1
        if (at - back) & 1:  # an even number of backslashes before the quote
            return at + 1
        at += 1


def _object_end(data: bytes, start: int) -> int:
    """Return the index after the object or array that opens at `start`; `data` is valid JSON."""
    depth = 0
    at = start
    while True:
        found = _STRUCTURAL.search(data, at)
        if found is None:
            raise ValueError("the octets end within an object")
        at = found.start()
        octet = data[at]
        if octet == _QUOTE:
            at = _string_end(data, at)
            continue
        depth += 1 if octet in _OPENING else -1
        at += 1
        if depth == 0:
            return at
