"""Heads that came before: programs repeat themselves, and equal octets need no second look.

The heads of one client, and those of one engine within a second, differ in the digits of their
Content-Length and in nothing else. So a head is remembered by its octets without those digits, and
when it comes again only the number is read. Nothing is trusted on the strength of anything but
equality, and only what was checked and found right is ever remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from proxy.core import limits
from proxy.core.http1 import HOP

# The usual spellings: a field in any other is read afresh each time, and judged by the reader.
_LENGTH_LOW: Final = b"\r\ncontent-length: "
_LENGTH_HIGH: Final = b"\r\nContent-Length: "
_LENGTH_BYTES: Final = 18  # of either of them
_DIGITS_MAX: Final = 18
# No two of these are equal: a hop's field, as we write it, and a client's trace, as most write it.
_NEVER_AGAIN: Final = b"\r\n" + HOP + b": "
_TRACED: Final = b"\r\ntraceparent: "
_ZERO: Final = 0x30
_NINE: Final = 0x39


class Head(Protocol):
    """What the memory must know of a head."""

    @property
    def content_length(self) -> int: ...

    @property
    def counted(self) -> bool:
        """Whether the Content-Length field says how long the body is."""


H = TypeVar("H", bound=Head)


def _digits(block: bytes) -> tuple[int, int, int]:
    """Return where the digits of Content-Length are, and their number; -1 where they are not plain.

    They are digits of ASCII, and nothing but the line's end, or the block's, comes after them.
    """
    at = block.find(_LENGTH_LOW)
    if at < 0:
        at = block.find(_LENGTH_HIGH)
        if at < 0:
            return -1, -1, 0
    start = end = at + _LENGTH_BYTES
    stop = min(len(block), start + _DIGITS_MAX)
    number = 0
    while end < stop and _ZERO <= (octet := block[end]) <= _NINE:
        number = number * 10 + octet - _ZERO
        end += 1
    if end == start or (end < len(block) and block[end : end + 2] != b"\r\n"):
        return -1, -1, 0
    return start, end, number


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
        start, end, number = _digits(block)
        if start < 0:
            head = self._plain.get(block)
            if head is None:
                head = self._parse(block)
                self._remember(self._plain, block, head)
            return head, head.content_length
        key = block[:start] + block[end:]
        head = self._counted.get(key)
        if head is None:
            head = self._parse(block)
            if key.lower().count(b"content-length") == 1:  # equal doubles hold further digits
                self._remember(self._counted, key, head)
        return head, number if head.counted else head.content_length

    def _remember(self, known: dict[bytes, H], key: bytes, head: H) -> None:
        if len(key) > limits.REMEMBERED_HEAD_BYTES_MAX or _NEVER_AGAIN in key or _TRACED in key:
            return
        if len(known) >= limits.HEADS_REMEMBERED_MAX:
            known.clear()
        known[key] = head

    def clear(self) -> None:
        """Remember nothing of what came before."""
        self._counted.clear()
        self._plain.clear()

    def __len__(self) -> int:
        return len(self._counted) + len(self._plain)
