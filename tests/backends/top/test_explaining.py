"""A dry run in words: whatever the proxy says is read, and what it does not say is not missed."""

from __future__ import annotations

import json

import pytest

from backends.top.explaining import explained, path_of, sample_body

ANSWER = {
    "model": "m",
    "class": "online",
    "policy": "prefix",
    "chain": {"prompt_octets": 2048, "points": []},
    "decision": {
        "replica": "m-1",
        "reason": "prefix",
        "prompt_tokens": 512,
        "price_s": 0.0123,
        "wait_s": 0.01,
        "prefill_s": 0.0023,
        "stall_s": 0.0,
    },
    "candidates": [
        {"replica": "m-1", "state": "ready", "may_take": True, "price_s": 0.0123, "stall_s": 0.0},
        {"replica": "m-0", "may_take": False, "reason": "it is draining"},
    ],
}


def test_a_decision_is_told_with_its_price_term_by_term() -> None:
    lines = explained(json.dumps(ANSWER).encode(), 74).splitlines()
    assert lines[0] == "model m  class online  policy prefix  prompt 2.0 KiB"
    assert "goes to m-1, because: prefix" in lines
    assert "price 12 ms: wait 10 ms + prefill 2.3 ms" in lines
    table = lines[lines.index("") + 1 :]
    assert any(line.split() == ["m-1", "yes", "12", "ms", "-"] for line in table)
    assert any(line.startswith("m-0") and line.endswith("it is draining") for line in table)
    assert "stall_s" not in "\n".join(table), "a term that costs nobody anything"
    assert all(len(line) <= 74 for line in table)


OTHERS = [
    ({"error": {"message": "no model 'x'"}}, "it would be refused: no model 'x'"),
    ({"decision": None, "held": True}, "goes nowhere: held until a replica is up"),
    ({"decision": None, "error": {"error": {"message": "full"}}}, "goes nowhere: full"),
    ([1], "[\n  1\n]"),
]


@pytest.mark.parametrize(("answer", "words"), OTHERS)
def test_other_answers(answer: object, words: str) -> None:
    assert explained(json.dumps(answer).encode(), 74).strip() == words


def test_what_is_no_json_is_shown_as_it_came() -> None:
    assert explained(b"<html>\x1b[2J", 74) == "<html>�[2J"


def test_a_body_says_where_it_would_be_sent() -> None:
    assert path_of(sample_body("m")) == "/v1/chat/completions"
    assert path_of(b'{"prompt": "x"}') == "/v1/completions"
    assert path_of(b'{"input": "x"}') == "/v1/responses"
    with pytest.raises(TypeError, match="object"):
        path_of(b"[]")
