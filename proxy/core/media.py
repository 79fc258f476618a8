"""Pictures and sound within a JSON body: which strings they are, and what they weigh.

For identity they count by their octets, like everything else: another picture is another prompt.
For load they must not. A picture of a megabyte in base64 would be taken for 350,000 tokens, and
would block a replica in the books; an engine makes about a thousand of it, whatever its octets.

A string is taken for data by its name, its size and its beginning: it is the value of a member
that holds data in one of the dialects (`url` of an `image_url`, `data` of an `input_audio` …); it
is as long as what it will weigh, or longer; and its first octets, behind the `data:…,` of a URL,
are base64 without a break. The name keeps text what a client pasted into a text, which the engine
does tokenize; the beginning keeps documents of plain text, which come as `data`, too. Neither asks
for the whole string to be read again. What a short one weighs is its octets, about as much.

A prompt has so many *regions* of data, one for each string; further ones are lumped with the last.
They are found by `_media.h` during the scan in C, and by this module where that has not been.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from proxy.core import limits

_BACKSLASH: Final = 0x5C
# As in `_media.h`, and tests compare them. Of 2,048 octets of base64, each 64th is base64, 32 in a
# row; text is hardly ever like that, and nothing else is looked at. There, a run twice as long as a
# stride lies over a whole stride somewhere.
_EVERY: Final = 64
_STRIDE: Final = 1024
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/\\_-"
_MARKS: Final = bytes([octet in _ALPHABET for octet in range(256)])
_MARKED: Final = b"\1" * 32
_NAMED: Final = re.compile(
    rb'(?<!\\)"(?:url|data|image_url|file_data|image|audio|video|image_embeds)"'
    rb"[ \t\r\n]{0,40}:[ \t\r\n]{0,40}\Z"
)
_NAMED_BYTES_MAX: Final = 100
# The backslash is in it for `\/`, as PHP writes the slash, and for `\n`, where lines are broken.
_BEGINS: Final = re.compile(rb'(?:data:[^",]{0,122},)?[A-Za-z0-9+/\\_-]{2048}')
_WITHIN: Final = re.compile(rb"[A-Za-z0-9+/\\_-]{1024}")

# What one weighs, in octets of text. A shorter string is no heavier by its own.
WEIGHT_BYTES: Final = limits.MEDIA_TOKENS * limits.BYTES_PER_TOKEN

# A region as it stands in `Scanned.media`: start, end, octets of data, strings.
FIELDS: Final = 4
OCTETS: Final = 2
STRINGS: Final = 3


def find_media(octets: bytes, begin: int, end: int) -> list[int]:
    """Return the regions within `octets[begin:end]`, which is one part of a prompt, checked."""
    found: list[int] = []
    marks = octets[begin:end:_EVERY].translate(_MARKS)
    first = marks.find(_MARKED)
    at = begin
    while first >= 0:
        last = marks.find(b"\0", first)
        stop = min(end, begin + last * _EVERY) if last >= 0 else end
        at = max(at, begin + first * _EVERY)
        while at + _STRIDE <= stop:
            start = _data_start(octets, begin, at, end)
            if start < 0:
                at += _STRIDE
                continue
            at = string_end(octets, start)
            if at - 1 - start >= WEIGHT_BYTES:
                _add(found, start, at - 1)
        first = marks.find(_MARKED, last) if last >= 0 else -1
    return found


def _add(found: list[int], start: int, end: int) -> None:
    if len(found) < FIELDS * limits.MEDIA_REGIONS_MAX:
        found += (start, end, end - start, 1)
    else:
        found[-3] = end
        found[-2] += end - start
        found[-1] += 1


def _data_start(octets: bytes, begin: int, at: int, end: int) -> int:
    """Return where the data that `at` lies in begins, behind its quote; -1: in none."""
    if _WITHIN.match(octets, at, end) is None:
        return -1
    # Before a run of base64 that the stride before has missed there is little.
    quote = octets.rfind(b'"', max(begin, at - 2 * _STRIDE), at)
    if quote < 0 or _NAMED.search(octets, max(begin, quote - _NAMED_BYTES_MAX), quote) is None:
        return -1
    return quote + 1 if _BEGINS.match(octets, quote + 1, end) is not None else -1


def string_end(octets: bytes, at: int) -> int:
    """Return the index after the string whose text begins at `at`, or -1."""
    while (at := octets.find(b'"', at)) >= 0:
        back = at - 1
        while octets[back] == _BACKSLASH:
            back -= 1
        at += 1
        if (at - back) & 1 == 0:  # an even number of backslashes before the quote
            return at
    return -1


def placed(media: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the regions within some spans, with places as if these stood one behind another."""
    found: list[int] = []
    before = 0
    for first, last in spans:
        for at in range(0, len(media), FIELDS):
            if first <= media[at] < last:
                shift = before - first
                found += (media[at] + shift, media[at + 1] + shift, *media[at + 2 : at + 4])
        before += last - first
    return found


def weighed(places: Sequence[int], regions: Sequence[int]) -> list[int]:
    """Return what a prompt weighs up to each of some places, which rise, in octets of text.

    Data weighs something once all of it is there: an engine keeps a whole picture, or none of it.
    """
    weights: list[int] = []
    at = saved = 0
    for place in places:
        while at < len(regions) and regions[at + 1] <= place:
            text_bytes = regions[at + STRINGS] * WEIGHT_BYTES
            saved += regions[at + OCTETS] - text_bytes
            at += FIELDS
        within = at < len(regions) and regions[at] < place
        weights.append((regions[at] if within else place) - saved)
    return weights
