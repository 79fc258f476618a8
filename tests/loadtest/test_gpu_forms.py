"""What is right of an answer of each form, and the forms rehearsed with the simulator."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest

from loadtest.gpu.forms import KINDS, Kind, body_of, differences, follows_schema, wrong
from loadtest.gpu.offline import STEPS, Run, prove
from loadtest.gpu.offline_stage import Setting
from loadtest.gpu.steps import Verdict

USAGE = {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
PAINT = '{"name": "a", "count": 7, "colour": "red"}'


def kind(name: str, url: str = "/v1/chat/completions") -> Kind:
    """Return a kind by its name."""
    return next(one for one in KINDS if (one.name, one.url) == (name, url))


def chat(text: str | None, **message: Any) -> dict[str, Any]:
    """Return an answer of a chat."""
    choice = {"index": 0, "message": {"content": text, **message}, "finish_reason": "stop"}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": [choice], "usage": USAGE}


def call(name: str, arguments: str) -> dict[str, Any]:
    """Return an answer that calls a tool."""
    function = {"name": name, "arguments": arguments}
    return chat(None, tool_calls=[{"id": "1", "type": "function", "function": function}])


def test_the_forms_are_done_by_a_worker_as_by_its_server(tmp_path: Path) -> None:
    args = ("--profile", "fast")
    setting = Setting(engine="simulator", model_path="", args=args, form_lines=1)
    found = asyncio.run(prove(Run(setting, tmp_path, tmp_path), STEPS[:3], 0.0))
    assert [finding.name for finding in found] == list(STEPS[3:])
    for finding in found:
        assert (finding.verdict, finding.broken) == (Verdict.PASS, ()), finding.name
    assert found[0].figures["chat/completions: n of 2"] == "1 of 1"
    assert found[1].figures["answers compared"] == 10
    assert found[2].figures["embeddings: base64"] == "1 of 1"


@pytest.mark.parametrize(
    ("name", "answer", "fine"),
    [
        ("plain", chat("anything"), True),
        ("plain", {**chat("anything"), "usage": {**USAGE, "total_tokens": 4}}, False),
        ("plain", {**chat("anything"), "object": "text_completion"}, False),
        ("n of 2", chat("one alone"), False),
        ("json_schema", chat(PAINT), True),
        ("json_schema", chat(PAINT[:-1]), False),
        ("regex", chat("abcd-123"), True),
        ("regex", chat("abcd-1234"), False),
        ("choice", chat("beta"), True),
        ("choice", chat("beta "), False),
        ("grammar", chat("maybe"), False),
        ("stop", chat("alpha "), True),
        ("stop", chat("alpha beta gamma"), False),
        ("named tool", call("paint", PAINT), True),
        ("named tool", call("paint", "{}"), False),
        ("required tool", call("paint", PAINT), True),
        ("required tool", call("draw", PAINT), False),
        ("required tool", chat(PAINT), False),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_found(
    name: str, answer: dict[str, Any], fine: bool
) -> None:
    assert (not wrong(kind(name), 200, answer)) == fine


def test_an_error_has_openais_form_and_code() -> None:
    asked = kind("long prompt")
    error = {"message": "too long", "type": "invalid_request_error", "param": None}
    right = {"error": {**error, "code": "context_length_exceeded"}}
    assert not wrong(asked, 400, right)
    assert "code None" in wrong(asked, 400, {"error": {**error, "code": None}})[0]
    assert "no error" in wrong(asked, 400, {"error": error})[0]
    assert "status 200" in wrong(asked, 200, right)[0]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "thirteen chars", "count": 7, "colour": "red"}',
        '{"name": "a", "count": 100, "colour": "red"}',
        '{"name": "a", "count": true, "colour": "red"}',
        '{"name": "a", "count": 7, "colour": "blue"}',
        '{"name": "a", "count": 7}',
        "[]",
        "",
    ],
)
def test_what_does_not_follow_the_schema_is_seen(text: str) -> None:
    assert follows_schema(PAINT)
    assert not follows_schema(text)


def test_fields_that_only_one_side_has_and_other_types_are_differences() -> None:
    ours, theirs = chat("one"), chat("two")
    assert differences(ours, theirs) == []
    theirs = copy.deepcopy(theirs)
    theirs["choices"][0]["message"]["schema_"] = 1
    theirs["usage"]["prompt_tokens"] = "3"
    theirs["created"] = None
    assert differences(ours, theirs) == [
        ".choices[].message.schema_ only in the server",
        ".usage.prompt_tokens: number, str of the server",
    ]


def test_the_lines_of_a_kind_differ_and_ask_for_what_it_says() -> None:
    first, second = (body_of(kind("plain"), "m", number) for number in (0, 1))
    assert first != second
    assert first["ignore_eos"] is True
    assert first["max_tokens"] == kind("plain").tokens
