"""Heads that came before: programs repeat themselves, and equal octets need no second look.

The heads of one client, and those of one engine within a second, differ in the digits of their
Content-Length and in nothing else. So a head is remembered by its octets without those digits, and
when it comes again only the number is read. Nothing is trusted on the strength of anything but
equality, and only what was checked and found right is ever remembered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from proxy.core import limits

# Only the usual spelling: any other is read afresh each time, and judged by the reader.
_COUNTED: Final = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,18})(?=\r\n|\Z)")


class Head(Protocol):
    """What the memory must know of a head."""

    @property
    def content_length(self) -> int: ...

    @property
    def counted(self) -> bool:
        """Whether the Content-Length field says how long the body is."""


H = TypeVar("H", bound=Head)


class HeadMemory(Generic[H]):
    """The heads that `read` has met, at most `HEADS_REMEMBERED_MAX` of each kind.

    A full memory is emptied: what is in use is back within a few requests.
    """

    __slots__ = ("_counted", "_parse", "_plain")

    def __init__(self, parse: Callable[[bytes], H]) -> None:
        self._parse = parse
        self._counted: dict[bytes, H] = {}
        self._plain: dict[bytes, H] = {}  # apart, or an empty field could pass for a counted one

    def read(self, block: bytes) -> tuple[H, int]:
        """Return the head and the length that it gives its body. Raises what the reader raises."""
        found = _COUNTED.search(block)
        if found is None:
            head = self._plain.get(block)
            if head is None:
                head = self._parse(block)
                self._remember(self._plain, block, head)
            return head, head.content_length
        start, end = found.span(1)
        key = block[:start] + block[end:]
        head = self._counted.get(key)
        if head is None:
            head = self._parse(block)
            if key.lower().count(b"content-length") == 1:  # equal doubles hold further digits
                self._remember(self._counted, key, head)
        return head, int(found[1]) if head.counted else head.content_length

    def _remember(self, known: dict[bytes, H], key: bytes, head: H) -> None:
        if len(key) > limits.REMEMBERED_HEAD_BYTES_MAX:
            return
        if len(known) >= limits.HEADS_REMEMBERED_MAX:
            known.clear()
        known[key] = head

    def __len__(self) -> int:
        return len(self._counted) + len(self._plain)
