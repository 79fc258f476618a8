"""Input files of jobs, made up: what varies is drawn from a seed, so that runs compare.

Words are English and short, about a token each. The answer has exactly the tokens that its line
asks for (`ignore_eos`), so that every way of doing the lines has the same work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

import msgspec
import orjson

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS: Final = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word"
)


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Of all lines of a job; ranges are uniform, both ends included."""

    lines: int
    prompt_words: tuple[int, int] = (50, 350)
    answer_tokens: tuple[int, int] = (32, 224)
    prefixes: int = 0  # different beginnings that the lines share between them; 0: none
    prefix_words: int = 0  # of each
    seed: int = 1


def bodies(shape: Shape, model: str, url: str = CHAT) -> list[dict[str, object]]:
    """Return the requests, in no order: those with the same prefix are far apart."""
    draw = random.Random(shape.seed)
    prefixes = [_words(draw, shape.prefix_words) for _ in range(shape.prefixes)]
    made: list[dict[str, object]] = []
    for number in range(shape.lines):
        content = f"{number} {_words(draw, draw.randint(*shape.prompt_words))}"
        prefix = prefixes[number % len(prefixes)] if prefixes else ""
        prompt: dict[str, object] = {"prompt": f"{prefix} {content}".strip()}
        if url == CHAT:
            messages = [{"role": "system", "content": prefix}] if prefix else []
            prompt = {"messages": [*messages, {"role": "user", "content": content}]}
        made.append(
            {
                "model": model,
                **prompt,
                "max_tokens": draw.randint(*shape.answer_tokens),
                "temperature": 0.0,
                "ignore_eos": True,
            }
        )
    draw.shuffle(made)
    return made


def input_file(requests: list[dict[str, object]], url: str = CHAT) -> bytes:
    """Return the file of a batch with these requests."""
    return b"".join(_rows(requests, url))


def sorted_by_prefix(requests: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the requests with those next to each other that begin alike."""
    prompt = ("messages", "prompt")
    return sorted(requests, key=lambda body: orjson.dumps([body.get(name) for name in prompt]))


def _rows(requests: list[dict[str, object]], url: str) -> Iterator[bytes]:
    for number, body in enumerate(requests):
        row = {"custom_id": f"line-{number}", "method": "POST", "url": url}
        yield orjson.dumps({**row, "body": body}, option=orjson.OPT_APPEND_NEWLINE)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS.split(), k=count))
