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

# The usual spellings: a field in any other is read afresh each time, and judged by the reader.
_LENGTH: Final[tuple[bytes, ...]] = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")
_LENGTH_BYTES: Final = 18  # of either of them
_DIGITS_MAX: Final = 18


class Head(Protocol):
    """What the memory must know of a head."""

    @property
    def content_length(self) -> int: ...

    @property
    def counted(self) -> bool:
        """Whether the Content-Length field says how long the body is."""


H = TypeVar("H", bound=Head)


def _digits(block: bytes) -> tuple[int, int]:
    """Return where the digits of Content-Length are; (-1, -1) where they are not plainly digits."""
    at = block.find(_LENGTH[0])
    if at < 0:
        at = block.find(_LENGTH[1])
        if at < 0:
            return -1, -1
    start = at + _LENGTH_BYTES
    end = block.find(b"\r\n", start)
    if end < 0:
        end = len(block)
    if end - start > _DIGITS_MAX or not block[start:end].isdigit():  # of octets: ASCII digits alone
        return -1, -1
    return start, end


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
        start, end = _digits(block)
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
        return head, int(block[start:end]) if head.counted else head.content_length

    def _remember(self, known: dict[bytes, H], key: bytes, head: H) -> None:
        if len(key) > limits.REMEMBERED_HEAD_BYTES_MAX:
            return
        if len(known) >= limits.HEADS_REMEMBERED_MAX:
            known.clear()
        known[key] = head

    def __len__(self) -> int:
        return len(self._counted) + len(self._plain)
