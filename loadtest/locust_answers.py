"""What an answer of an OpenAI-compatible server says, for `locustfile.py`, which needs this file.

Pure: bytes and times in, values out. An answer is whole when its stream came to `[DONE]`; what
ends before, or tells of an error in an event, has failed although its status was 200. Errors are
told by status and code, since Locust keeps one row for each different text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

CODE_CHARACTERS_MAX = 80


class Answer:
    """What one answer said, and when."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.first_s = self.last_s = 0.0
        self.events = 0  # that carried tokens
        self.usage: dict[str, Any] = {}
        self.error = ""
        self.done = False

    def take(self, line: bytes, now_s: float) -> None:
        """Take a line of an event stream (WHATWG HTML, "Server-sent events")."""
        if not line.startswith(b"data:"):
            return  # the end of an event, a comment, another field
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return
        try:
            self.take_value(json.loads(data), now_s)
        except (ValueError, AttributeError, TypeError, KeyError):
            self.error = self.error or "event is not a JSON object of the API"

    def take_value(self, value: dict[str, Any], now_s: float) -> None:
        if value.get("error"):
            self.error = f"in stream: {code_of(value)}"
        self.usage = value.get("usage") or self.usage
        pieces = [piece for choice in value.get("choices") or () for piece in tokens_in(choice)]
        if pieces:
            self.events += 1
            self.first_s = self.first_s or now_s
            self.last_s = now_s
            self.text += pieces

    @property
    def output_tokens(self) -> int:
        """As the server counts them; else an event is a token."""
        return int(self.usage.get("completion_tokens") or self.events)


def tokens_in(choice: dict[str, Any]) -> Iterator[str]:
    """Yield what a choice says; reasoning and calls of tools are tokens, too."""
    said = choice.get("delta") or choice.get("message") or choice
    for name in ("reasoning_content", "reasoning", "content", "text", "tool_calls"):
        if value := said.get(name):
            yield value if isinstance(value, str) else json.dumps(value)


def code_of(value: Any) -> str:
    """Return the code of an error in any of the engines' shapes: few different words."""
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        # vLLM and SGLang have the status as a number there, which says nothing more.
        code = error.get("code") if isinstance(error.get("code"), str) else None
        error = code or error.get("type") or error.get("message") or "no code"
    return str(error)[:CODE_CHARACTERS_MAX]


def error_code(status: int, body: bytes | str | None) -> str:
    try:
        return f"{status} {code_of(json.loads(body or ''))}"
    except ValueError:
        return f"{status} without a JSON body"


def lines_wrong(wanted: list[str], results: list[dict[str, Any]]) -> str:
    """Return what is wrong with a job's results; empty when each line came once and went well."""
    seen = Counter(str(result.get("custom_id")) for result in results)
    failed = sum((result.get("response") or {}).get("status_code") != 200 for result in results)
    found = {
        "missing": len(set(wanted) - set(seen)),
        "unknown": len(set(seen) - set(wanted)),
        "twice": sum(count > 1 for count in seen.values()),
        "failed": failed,
    }
    return ", ".join(f"{count} lines {what}" for what, count in found.items() if count)


def form_of(lines: str, mark: str) -> tuple[str, str]:
    """Return a form that uploads a file of lines, and its media type (RFC 7578)."""
    head = f'--{mark}\r\nContent-Disposition: form-data; name="'
    form = f'{head}purpose"\r\n\r\nbatch\r\n{head}file"; filename="lines.jsonl"\r\n'
    form += f"Content-Type: application/jsonl\r\n\r\n{lines}\r\n--{mark}--\r\n"
    return form, f"multipart/form-data; boundary={mark}"
