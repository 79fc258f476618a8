"""The requests that are sent: chat conversations of three sizes, made the same way every time.

Requests of a group share their system prompt and first turns, as those of one application do, and
end in a question of their own, in which the load generator writes a number that no other request
has. The text is what people send: quotes and line ends that JSON escapes, some of it not ASCII.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import msgspec
import orjson

from loadtest.words import WORDS

TAG = "@@@@@@@@"  # the load generator's place for a number
GROUPS = 8
USERS = 64
MODEL = "demo"
FRAME_BYTES = 247  # of JSON around the texts, and what these are longer than asked for
_FIRST_KEY = 0x89ABCDEF
UPLOAD_BYTES = 16 * 1024 * 1024

_EXOTIC = ("naïve", "größer", "日本語", "—", "Ελλάδα", "🙂")
_HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\n"
    "host: 127.0.0.1\r\n"
    "accept: application/json\r\n"
    "user-agent: loadtest/1\r\n"
    "authorization: Bearer {key}\r\n"
    "x-user-id: user-{user}\r\n"
    "content-type: application/json\r\n"
    "content-length: {length}\r\n\r\n"
)


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """A class of bodies; its label is what it is called, its mean what it is."""

    label: str
    mean_bytes: int
    count: int  # different requests, sent in turn


SIZES = {
    "1kb": Size(label="1 KB", mean_bytes=1_560, count=512),
    "16kb": Size(label="16 KB", mean_bytes=18_300, count=256),
    "128kb": Size(label="128 KB", mean_bytes=143_000, count=64),
}


def text(draw: random.Random, length_bytes: int) -> str:
    """Return some `length_bytes` of prose, lists and code; its words depend on `draw` alone."""
    parts: list[str] = []
    size = 0
    while size < length_bytes:
        chance = draw.random()
        if chance < 0.02:
            part = f'"{draw.choice(WORDS)} {draw.choice(WORDS)}" '
        elif chance < 0.04:
            part = ".\n\n- " if chance < 0.03 else ":\n\tif x[0] == '\\n': return {}\n"
        elif chance < 0.055:
            part = draw.choice(_EXOTIC) + " "
        else:
            part = draw.choice(WORDS) + " "
        parts.append(part)
        size += len(part.encode())
    return "".join(parts)


def conversation(number: int, length_bytes: int) -> list[dict[str, str]]:
    """Return the messages of request `number`: the group's beginning, and a tail of its own.

    A third of the octets are the group's system prompt, a quarter the conversation's earlier turns,
    which every fourth request of the group shares, and the rest is new.
    """
    group = number % GROUPS
    shared = random.Random(f"group {group}")
    turns = random.Random(f"turns {group} {number // GROUPS % 4}")
    own = random.Random(f"own {number}")
    return [
        {"role": "system", "content": text(shared, length_bytes // 3)},
        {"role": "user", "content": text(turns, length_bytes // 8)},
        {"role": "assistant", "content": text(turns, length_bytes // 8)},
        {"role": "user", "content": text(own, length_bytes * 5 // 12) + TAG},
    ]


def body(number: int, length_bytes: int, *, stream: bool) -> bytes:
    """Return the JSON of one request, its fields in the order of the official client."""
    value: dict[str, Any] = {
        "messages": conversation(number, length_bytes),
        "model": MODEL,
        "max_tokens": 128,
        "stream": stream,
        "temperature": 0.7,
    }
    return orjson.dumps(value)


def key(number: int) -> str:
    """Return one of the API keys that requests carry."""
    return f"sk-0123456789abcdef01234567{_FIRST_KEY + number:08x}"


def request(content: bytes, number: int, keys: int = 1) -> bytes:
    """Return the whole request; its user is for routers that know prompts by nothing else.

    `keys` is how many keys there are, in turn.
    """
    head = _HEAD.format(length=len(content), user=number % USERS, key=key(number % keys))
    return head.encode() + content


def packed(requests: list[bytes]) -> bytes:
    """Return the form that the load generator reads: each behind its length."""
    return b"".join(struct.pack("<I", len(one)) + one for one in requests)


def size_requests(size: Size, *, stream: bool, keys: int = 1) -> list[bytes]:
    """Return the requests of a size: from half to one and a half of its mean, which they meet."""
    spread = random.Random(size.label)
    lengths = [size.mean_bytes * spread.uniform(0.5, 1.5) for _ in range(size.count)]
    scale = size.mean_bytes / (sum(lengths) / len(lengths))
    return [
        request(body(number, int(length * scale) - FRAME_BYTES, stream=stream), number, keys)
        for number, length in enumerate(lengths)
    ]


def write_requests(folder: Path, name: str, *, stream: bool, keys: int = 1) -> Path:
    """Write the requests of size `name` for the load generator; those that exist stay."""
    path = folder / f"{name}-{'stream' if stream else 'json'}-{keys}.requests"
    if not path.exists():
        path.write_bytes(packed(size_requests(SIZES[name], stream=stream, keys=keys)))
    return path


def write_upload(folder: Path) -> Path:
    """Write one request of 16 MB, as one with images or a long document is."""
    path = folder / "upload.requests"
    if not path.exists():
        words = text(random.Random("upload"), 64 * 1024)
        content = (words * (UPLOAD_BYTES // len(words.encode()) + 1))[:UPLOAD_BYTES]
        value = {"messages": [{"role": "user", "content": content}], "model": MODEL}
        path.write_bytes(packed([request(orjson.dumps(value), 0)]))
    return path
