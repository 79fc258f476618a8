"""In which order lines are done, and how much work each is: from the raw octets of its body.

Lines whose prompts begin alike should reach an engine together, because the second finds the
first's prefix in the cache, and a cache keeps only what was used last. So a job's lines are sorted
by a key that is a list of hashes: of the prompt's first 128 octets, its first 256, and so on by
doubling. Prompts that share n octets share the beginning of their keys up to the last depth within
n, so that neighbours in the order of keys are those with the longest shared beginning, to within a
factor of two. A key has 8 octets for each depth, however long the prompt: the order of a job of
any size is an index of the database, never a sort in memory.

The prompt is taken as engines render it: adapter and salt first (they part caches altogether),
then tools, what the system says, and what the user says. It is compared as it was written; two
clients that write the same prompt with other spaces are not brought together, which costs nothing
but a chance.

Tokens are estimated as octets / 4, the usual figure for English text in JSON, images as a constant.
The answer is what the request allows or, where it allows anything, `ANSWER_TOKENS`: this feeds the
sizing of worker pools, which correct it by what they measure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
from xxhash import xxh3_64

DEPTHS_BYTES = tuple(128 << n for n in range(10))  # 128 octets to 64 KiB
SORT_KEY_BYTES_MAX = 8 * len(DEPTHS_BYTES)
OCTETS_PER_TOKEN = 4
ANSWER_TOKENS = 256
COMPLETION_TOKENS = 16  # what /v1/completions answers where the request does not say, by its API
IMAGE_TOKENS = 1000  # a 1024 x 1024 picture is 765 to 1,300 tokens in common vision models
CHOICES_MAX = 128
ANSWER_TOKENS_MAX = 1_000_000

_EMBEDDED = re.compile(rb";base64,[A-Za-z0-9+/=\\]*")

Part = msgspec.Raw | msgspec.UnsetType


class Prompt(msgspec.Struct, frozen=True):
    """Those parts of a request's body that say what it costs, unread."""

    model: Part = msgspec.UNSET
    stream: Part = msgspec.UNSET
    lora_path: Part = msgspec.UNSET
    cache_salt: Part = msgspec.UNSET
    tools: Part = msgspec.UNSET
    instructions: Part = msgspec.UNSET
    messages: Part = msgspec.UNSET
    prompt: Part = msgspec.UNSET
    input: Part = msgspec.UNSET
    n: Part = msgspec.UNSET
    max_tokens: Part = msgspec.UNSET
    max_completion_tokens: Part = msgspec.UNSET
    max_output_tokens: Part = msgspec.UNSET

    @property
    def parts(self) -> list[bytes]:
        """Everything that a cached prefix depends on, in the order in which engines render it."""
        ordered = (
            self.lora_path,
            self.cache_salt,
            self.tools,
            self.instructions,
            self.messages,
            self.prompt,
            self.input,
        )
        return [bytes(part) for part in ordered if isinstance(part, msgspec.Raw)]


def sort_key(parts: Iterable[bytes]) -> bytes:
    """Return the hashes of ever longer beginnings of what `parts` are together."""
    hasher, done = xxh3_64(), 0
    key: list[bytes] = []
    depths = iter(DEPTHS_BYTES)
    depth = next(depths)
    for part in parts:
        at = 0
        while done + len(part) - at >= depth:
            hasher.update(part[at : at + depth - done])
            at, done = at + depth - done, depth
            key.append(hasher.digest())
            following = next(depths, None)
            if following is None:
                return b"".join(key)
            depth = following
        hasher.update(part[at:])
        done += len(part) - at
    key.append(hasher.digest())  # the whole: those that are equal are next to each other
    return b"".join(key)


def tokens_of(url: str, prompt: Prompt) -> int:
    """Estimate the tokens of a line, prompt and answer."""
    asked = 0
    for part in prompt.parts:
        octets = len(part)
        if b";base64," in part:
            spans = [match.end() - match.start() for match in _EMBEDDED.finditer(part)]
            octets -= sum(spans)
            asked += IMAGE_TOKENS * len(spans)
        asked += octets // OCTETS_PER_TOKEN
    if url == "/v1/embeddings":
        return max(1, asked)
    return max(1, asked + _answer_tokens(url, prompt))


def _answer_tokens(url: str, prompt: Prompt) -> int:
    usual = COMPLETION_TOKENS if url == "/v1/completions" else ANSWER_TOKENS
    limits = (prompt.max_completion_tokens, prompt.max_output_tokens, prompt.max_tokens)
    allowed = next((n for limit in limits if (n := _whole(limit)) is not None), usual)
    return min(allowed, ANSWER_TOKENS_MAX) * min(_whole(prompt.n) or 1, CHOICES_MAX)


def _whole(part: Part) -> int | None:
    """Return the number in `part`, if it is a sensible one; what it is not, an engine will say."""
    octets = bytes(part) if isinstance(part, msgspec.Raw) else b""
    return int(octets) if octets.isdigit() and len(octets) < 16 else None
