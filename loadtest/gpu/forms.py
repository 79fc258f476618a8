"""What a line may ask for, and what its answer must then be: pure functions over bodies.

A kind is one thing that a request can ask for. Its lines differ in their prompts. What is checked
needs no sense in the answers, so that weights drawn at random do: field names, counts, ends, and
for guided decoding that the text is of the grammar. Schemas are bounded in length, because a model
without sense would never close a string. Where the same body was given to the engine's own server,
`differences` compares the two by the names and types of their fields.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from loadtest.offline.lines import CHAT, COMPLETIONS

RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
Body = dict[str, Any]
Check = Callable[[Body], list[str]]  # of an answer: what is wrong with it
TOKENS = 16
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["name", "count", "colour"],
    "additionalProperties": False,
}
_TOOL = {"name": "paint", "description": "Paint things.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": _TOOL}]
NAMED = {"type": "function", "function": {"name": "paint"}}
REGEX = r"[a-f]{4}-[0-9]{3}"
CHOICES = ["alpha", "beta", "gamma"]
LONG = "word " * 40_000  # more than any model that this is tried with takes
_FIELDS = {
    CHAT: ("chat.completion", {"id", "object", "created", "model", "choices", "usage"}),
    COMPLETIONS: ("text_completion", {"id", "object", "created", "model", "choices", "usage"}),
    RESPONSES: (
        "response",
        {"id", "object", "created_at", "model", "output", "usage", "status"},
    ),
    EMBEDDINGS: ("list", {"object", "data", "model", "usage"}),
}
_ERROR = {"message", "type", "param", "code"}


class Kind(NamedTuple):
    """What its lines ask for beside a prompt, and what is to come of it."""

    name: str
    url: str
    fields: Body
    check: Check = lambda body: []  # beside the form
    choices: int = 1
    tokens: int = 0  # that the answer has, exactly; 0: as it comes
    status: int = 200
    code: str | None = None  # of an error
    simulated: bool = False  # the simulator does it as well


def body_of(kind: Kind, model: str, number: int) -> Body:
    """Return the request of a line."""
    text = f"{number}: tell of the water, the school and the night."
    prompts: dict[str, Body] = {
        CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS},
        COMPLETIONS: {"prompt": text, "max_tokens": TOKENS},
        RESPONSES: {"input": text, "max_output_tokens": TOKENS},
        EMBEDDINGS: {"input": text},
    }
    sampling = {} if kind.url == EMBEDDINGS else {"temperature": 0.0}
    return {"model": model, **prompts[kind.url], **sampling, **kind.fields}


# --- what is wrong with an answer ----------------------------------------------------------------


def wrong(kind: Kind, status: int, body: Body) -> list[str]:
    """Return what is wrong with the answer of a line of this kind."""
    if status != kind.status:
        return [f"status {status}, not {kind.status}: {str(body)[:300]}"]
    if status != 200:
        return _wrong_error(kind, body)
    object_, fields = _FIELDS[kind.url]
    if missing := fields - set(body):
        return [f"without {', '.join(sorted(missing))}"]
    found = [] if body["object"] == object_ else [f"object {body['object']!r}"]
    if (count := len(body[_many(kind.url)])) != kind.choices:
        found.append(f"{count} {_many(kind.url)}, not {kind.choices}")
    return found + _wrong_usage(kind, body["usage"]) + kind.check(body)


def _wrong_error(kind: Kind, body: Body) -> list[str]:
    error = body.get("error")
    if not isinstance(error, dict) or set(error) != _ERROR:
        return [f"no error of OpenAI's: {str(body)[:300]}"]
    found = [] if error["type"] == "invalid_request_error" else [f"type {error['type']!r}"]
    if error["code"] != kind.code:
        found.append(f"code {error['code']!r}, not {kind.code!r}: {error['message'][:200]}")
    if not error["message"]:
        found.append("without a message")
    return found


def _many(url: str) -> str:
    return {RESPONSES: "output", EMBEDDINGS: "data"}.get(url, "choices")


def _wrong_usage(kind: Kind, usage: Body) -> list[str]:
    names = {
        RESPONSES: ("input_tokens", "output_tokens"),
        EMBEDDINGS: ("prompt_tokens", ""),
    }.get(kind.url, ("prompt_tokens", "completion_tokens"))
    prompt, answer = usage.get(names[0], 0), usage.get(names[1], 0)
    found = [] if prompt > 0 else ["usage without a prompt"]
    if usage.get("total_tokens") != prompt + answer:
        found.append(f"usage does not add up: {usage}")
    if kind.tokens and answer != kind.tokens:
        found.append(f"{answer} tokens, not {kind.tokens}")
    return found


def texts(body: Body) -> list[str]:
    """Return the texts of an answer."""
    if "output" in body:
        items = [item for item in body["output"] if item["type"] == "message"]
        return [part["text"] for item in items for part in item["content"]]
    return [
        choice["message"]["content"] or "" if "message" in choice else choice["text"]
        for choice in body.get("choices", [])
    ]


def follows_schema(text: str) -> bool:
    """Say whether a text is an object of `SCHEMA`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(value, dict) or set(value) != {"name", "count", "colour"}:
        return False
    name, count = value["name"], value["count"]
    fine = isinstance(name, str) and len(name) <= 12 and value["colour"] in {"red", "green"}
    return fine and type(count) is int and 0 <= count <= 99


def _all(what: str, holds: Callable[[str], bool]) -> Check:
    def check(body: Body) -> list[str]:
        found = texts(body)
        bad = [text for text in found if not holds(text)]
        return [f"not {what}: {bad[0]!r}"] if bad else ([] if found else ["no text"])

    return check


_SCHEMA = _all("of the schema", follows_schema)
_REGEX = _all("of the regex", lambda text: re.fullmatch(REGEX, text) is not None)
_CHOICE = _all("one of the choices", lambda text: text in CHOICES)
_OBJECT = _all("the beginning of an object", lambda text: text.lstrip().startswith("{"))
_YES = _all("of the grammar", lambda text: text in {"yes", "no"})


def _tools(body: Body) -> list[str]:
    """The first call is of the tool; a model without sense goes on calling until it is cut off."""
    calls = body["choices"][0]["message"].get("tool_calls") or []
    if not calls or calls[0]["type"] != "function" or not calls[0].get("id"):
        return [f"no call of a function: {calls!r}"]
    function = calls[0]["function"]
    fine = function["name"] == "paint" and follows_schema(function["arguments"])
    return [] if fine else [f"not a call of the tool: {function!r}"]


def _tool(body: Body) -> list[str]:
    calls = body["choices"][0]["message"].get("tool_calls") or []
    return _tools(body) if len(calls) == 1 else [f"not one call of a function: {calls!r}"]


def _stopped(body: Body) -> list[str]:
    choice = body["choices"][0]
    text, reason = texts(body)[0], choice["finish_reason"]
    fine = "beta" not in text and reason == "stop"
    return [] if fine else [f"not stopped: {text!r}, {reason!r}"]


def _chat_logprobs(body: Body) -> list[str]:
    content = (body["choices"][0]["logprobs"] or {}).get("content") or []
    fine = len(content) == TOKENS and all(
        len(item["top_logprobs"]) == 2 and item["logprob"] <= 0 for item in content
    )
    return [] if fine else [f"not {TOKENS} logprobs with 2 beside each: {str(content)[:200]}"]


def _logprobs(body: Body) -> list[str]:
    found = body["choices"][0]["logprobs"] or {}
    lengths = {name: len(found.get(name) or []) for name in ("tokens", "token_logprobs")}
    fine = set(lengths.values()) == {TOKENS}
    return [] if fine else [f"logprobs of {lengths}, not of {TOKENS} tokens"]


def _echoed(body: Body) -> list[str]:
    text = texts(body)[0]
    return [] if "tell of the water" in text else [f"the prompt is not in {text!r}"]


def _indexed(body: Body) -> list[str]:
    found = [item["index"] for item in body[_many(CHAT)]]
    return [] if found == list(range(len(found))) else [f"indices {found}"]


def _vectors(body: Body) -> list[str]:
    lengths = set()
    for index, item in enumerate(body["data"]):
        vector = item["embedding"]
        if isinstance(vector, str):
            vector = base64.b64decode(vector, validate=True)
        if item["object"] != "embedding" or item["index"] != index or not len(vector):
            return [f"no embedding: {str(item)[:200]}"]
        lengths.add(len(vector))
    return [] if len(lengths) == 1 else [f"vectors of {sorted(lengths)}"]


# --- the kinds ------------------------------------------------------------------------------------

_JSON = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
_TEXT = {"format": {"type": "json_schema", "name": "paint", "schema": SCHEMA, "strict": True}}
_PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
_TALK = [{"role": "system", "content": "short"}, {"role": "user", "content": "one"}]
_FEW = {"max_tokens": 96}
_ENDLESS = {"ignore_eos": True}
_TOO_LONG = "context_length_exceeded"


def _guided(**how: object) -> Body:
    return {"structured_outputs": how, **_FEW}


def _bad(name: str, url: str, code: str | None = None, **fields: object) -> Kind:
    return Kind(name, url, fields, status=400, code=code)


KINDS = (
    Kind("plain", CHAT, _ENDLESS, tokens=TOKENS, simulated=True),
    Kind("system", CHAT, {"messages": _TALK}, simulated=True),
    Kind("parts", CHAT, {"messages": _PARTS}),
    Kind("n of 2", CHAT, {"n": 2, "temperature": 0.8}, _indexed, choices=2, simulated=True),
    Kind("seed", CHAT, {"messages": _TALK, "temperature": 1.0, "seed": 7}, simulated=True),
    Kind("logprobs", CHAT, {"logprobs": True, "top_logprobs": 2, **_ENDLESS}, _chat_logprobs),
    Kind("stop", CHAT, {"stop": ["beta"], **_guided(choice=["alpha beta gamma"])}, _stopped),
    Kind("json_schema", CHAT, {"response_format": _JSON, **_FEW}, _SCHEMA),
    Kind("json_object", CHAT, {"response_format": {"type": "json_object"}}, _OBJECT),
    Kind("json", CHAT, _guided(json=SCHEMA), _SCHEMA),
    Kind("regex", CHAT, _guided(regex=REGEX), _REGEX),
    Kind("choice", CHAT, _guided(choice=CHOICES), _CHOICE),
    Kind("grammar", CHAT, _guided(grammar='root ::= "yes" | "no"'), _YES),
    Kind("named tool", CHAT, {"tools": TOOLS, "tool_choice": NAMED, **_FEW}, _tool),
    Kind("required tool", CHAT, {"tools": TOOLS, "tool_choice": "required", **_FEW}, _tools),
    Kind("auto tool", CHAT, {"tools": TOOLS, "tool_choice": "auto"}),
    _bad("no tools to choose from", CHAT, tool_choice="required"),
    _bad("warm temperature", CHAT, temperature="warm"),
    _bad("negative temperature", CHAT, temperature=-1.0),
    _bad("n of 0", CHAT, n=0),
    _bad("no messages", CHAT, messages=None),
    _bad("open regex", CHAT, **_guided(regex="(")),
    _bad("two grammars", CHAT, **_guided(regex=REGEX, choice=CHOICES)),
    _bad("long prompt", CHAT, _TOO_LONG, messages=[{"role": "user", "content": LONG}]),
    _bad("many tokens", CHAT, _TOO_LONG, max_tokens=10_000_000),
    Kind("plain", COMPLETIONS, _ENDLESS, tokens=TOKENS, simulated=True),
    Kind("token ids", COMPLETIONS, {"prompt": [300, 301, 302]}, simulated=True),
    Kind("two prompts", COMPLETIONS, {"prompt": ["a", "b"]}, _indexed, choices=2, simulated=True),
    Kind("n of 2", COMPLETIONS, {"n": 2, "temperature": 0.8}, _indexed, choices=2, simulated=True),
    Kind("logprobs", COMPLETIONS, {"logprobs": 2, **_ENDLESS}, _logprobs),
    Kind("echo", COMPLETIONS, {"echo": True}, _echoed),
    Kind("echo alone", COMPLETIONS, {"echo": True, "max_tokens": 0, "logprobs": 1}, _echoed),
    Kind("stop", COMPLETIONS, {"stop": "beta", **_guided(choice=["alpha beta gamma"])}, _stopped),
    Kind("json_schema", COMPLETIONS, {"response_format": _JSON, **_FEW}, _SCHEMA),
    Kind("regex", COMPLETIONS, _guided(regex=REGEX), _REGEX),
    _bad("unknown token", COMPLETIONS, prompt=[10_000_000]),
    _bad("long prompt", COMPLETIONS, _TOO_LONG, prompt=LONG),
    Kind("plain", RESPONSES, {}, simulated=True),
    Kind("talk", RESPONSES, {"input": _TALK, "instructions": "be brief"}, simulated=True),
    Kind("json_schema", RESPONSES, {"text": _TEXT, "max_output_tokens": 96}, _SCHEMA),
    _bad("warm temperature", RESPONSES, temperature="warm"),
    _bad("long prompt", RESPONSES, _TOO_LONG, input=LONG),
    Kind("unknown answer before", RESPONSES, {"previous_response_id": "resp_0"}, status=404),
    Kind("plain", EMBEDDINGS, {}, _vectors, simulated=True),
    Kind("two texts", EMBEDDINGS, {"input": ["a", "b"]}, _vectors, choices=2, simulated=True),
    Kind("token ids", EMBEDDINGS, {"input": [300, 301]}, _vectors, simulated=True),
    Kind("base64", EMBEDDINGS, {"encoding_format": "base64"}, _vectors, simulated=True),
    _bad("not so many dimensions", EMBEDDINGS, dimensions=8),
    _bad("no input", EMBEDDINGS, input=None),
    _bad("long prompt", EMBEDDINGS, _TOO_LONG, input=LONG),
)


# --- against the engine's own server --------------------------------------------------------------


def differences(ours: object, theirs: object, place: str = "") -> list[str]:
    """Return where two answers differ in names or types; what is null or empty fits anything."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if place.endswith("top_logprobs[]") and "logprob" not in ours:
            return []  # its names are tokens
        found = [
            f"{place}.{name} only in {'the line' if name in ours else 'the server'}"
            for name in sorted(set(ours) ^ set(theirs))
        ]
        for name in sorted(set(ours) & set(theirs)):
            found += differences(ours[name], theirs[name], f"{place}.{name}")
        return found
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = list(zip(ours, theirs, strict=False))[:2]
        return [text for one, two in pairs for text in differences(one, two, f"{place}[]")]
    if ours is None or theirs is None or _type(ours) == _type(theirs):
        return []
    return [f"{place}: {_type(ours)}, {_type(theirs)} of the server"]


def _type(value: object) -> str:
    return "number" if type(value) in {int, float} else type(value).__name__
