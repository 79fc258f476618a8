"""Which paths exist, and where in each body the prompt is.

An exact list on the raw path, so that no encoding, dot segment or case trick reaches an engine's
control surface: what is not here is 404 before anything is routed. LoRA loading, sleep, weights,
profiling and the token-level scale-out calls are deliberately absent.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from proxy import errors


class PromptKind(enum.Enum):
    """Which top-level fields make the prompt."""

    CHAT = enum.auto()  # tools, messages
    COMPLETION = enum.auto()  # prompt
    RESPONSES = enum.auto()  # tools, instructions, input
    ANTHROPIC = enum.auto()  # tools, system, messages
    INPUT = enum.auto()  # input, and what is like it: text to be embedded or scored
    OPAQUE = enum.auto()  # not JSON, or nothing to cache


@dataclass(frozen=True)
class Route:
    """One servable path."""

    name: str  # label in metrics and logs
    methods: frozenset[bytes]
    prompt: PromptKind = PromptKind.OPAQUE
    lookup: bool = False  # state that one replica holds: asked of each until one knows it
    local: bool = False  # answered by the proxy itself
    json: bool = True  # the body is a JSON object that names a model


# The offline service's, with all below them: octets pass as they come, and no replica sees them.
# Where there is no such service they are unknown, whatever the method.
JOBS_PATH: Final = b"/v1/batches"  # where they are made
OFFLINE_ROOTS: Final = (b"/v1/files", JOBS_PATH)

_POST = frozenset((b"POST",))
_GET = frozenset((b"GET", b"HEAD"))


def _post(name: str, prompt: PromptKind, *, json: bool = True) -> Route:
    return Route(name=name, methods=_POST, prompt=prompt, json=json)


def _offline(name: str, *methods: bytes) -> Route:
    return Route(name, frozenset(methods), json=False)


ROUTES: Final[dict[bytes, Route]] = {
    b"/v1/chat/completions": _post("chat", PromptKind.CHAT),
    b"/v1/chat/completions/batch": _post("chat", PromptKind.CHAT),
    b"/v1/completions": _post("completions", PromptKind.COMPLETION),
    b"/v1/responses": _post("responses", PromptKind.RESPONSES),
    b"/v1/messages": _post("messages", PromptKind.ANTHROPIC),
    b"/v1/messages/count_tokens": _post("count_tokens", PromptKind.ANTHROPIC),
    b"/v1/embeddings": _post("embeddings", PromptKind.INPUT),
    b"/v1/rerank": _post("rerank", PromptKind.INPUT),
    b"/v1/score": _post("score", PromptKind.INPUT),
    b"/v1/classify": _post("classify", PromptKind.INPUT),
    b"/v1/tokenize": _post("tokenize", PromptKind.INPUT),
    b"/v1/detokenize": _post("tokenize", PromptKind.INPUT),
    b"/v1/decisions": _post("decisions", PromptKind.INPUT),
    b"/v1/systemone": _post("systemone", PromptKind.INPUT),
    b"/v1/audio/transcriptions": _post("audio", PromptKind.OPAQUE, json=False),
    b"/v1/audio/translations": _post("audio", PromptKind.OPAQUE, json=False),
    b"/v2/embed": _post("embeddings", PromptKind.INPUT),
    b"/v2/rerank": _post("rerank", PromptKind.INPUT),
    b"/rerank": _post("rerank", PromptKind.INPUT),
    b"/score": _post("score", PromptKind.INPUT),
    b"/pooling": _post("pooling", PromptKind.INPUT),
    b"/classify": _post("classify", PromptKind.INPUT),
    b"/tokenize": _post("tokenize", PromptKind.INPUT),
    b"/detokenize": _post("tokenize", PromptKind.INPUT),
    b"/v1/files": _offline("files", b"GET", b"POST"),
    JOBS_PATH: _offline("batches", b"GET", b"POST"),
    b"/v1/models": Route("models", _GET, local=True),
    b"/health": Route("health", _GET, local=True),
    b"/livez": Route("health", _GET, local=True),
    b"/readyz": Route("health", _GET, local=True),
}


def _stored(name: str, *methods: bytes) -> Route:
    return Route(name, frozenset(methods), lookup=True, json=False)


_MODEL: Final = Route("models", _GET, local=True)
# One model name; the slash of "org/model" comes raw or as %2F.
_MODEL_PATH: Final = re.compile(rb"/v1/models/([A-Za-z0-9][A-Za-z0-9._:/%-]{0,255})")
# What one replica holds of earlier requests. The ids of completions begin as OpenAI's do, because
# engines have calls of their own beside them (vLLM's `/v1/chat/completions/render`).
_ID: Final = rb"[A-Za-z0-9_-]{1,128}"
_STORED: Final = (
    (re.compile(rb"/v1/responses/" + _ID), _stored("responses", b"GET")),
    (re.compile(rb"/v1/responses/" + _ID + rb"/cancel"), _stored("responses", b"POST")),
    (
        re.compile(rb"/v1/chat/completions/(?:chatcmpl|completion)[_-]" + _ID),
        _stored("stored_chat", b"GET", b"POST", b"DELETE"),
    ),
    (
        re.compile(rb"/v1/chat/completions/(?:chatcmpl|completion)[_-]" + _ID + rb"/messages"),
        _stored("stored_chat", b"GET"),
    ),
)
# Files and jobs. The id that a client gave a line may be any text, as one segment of a path; one of
# dots alone would be taken for a step in the tree.
_LINE_ID: Final = (
    rb"(?!(?:\.|%2[Ee]){1,2}\Z)(?:[A-Za-z0-9._~:@!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){1,1024}"
)
_KEPT: Final = (
    (re.compile(rb"/v1/files/" + _ID), _offline("files", b"GET", b"DELETE")),
    (re.compile(rb"/v1/files/" + _ID + rb"/content"), _offline("files", b"GET")),
    (re.compile(rb"/v1/batches/" + _ID), _offline("batches", b"GET")),
    (re.compile(rb"/v1/batches/" + _ID + rb"/cancel"), _offline("batches", b"POST")),
    (re.compile(rb"/v1/batches/" + _ID + rb"/results"), _offline("batches", b"GET")),
    (
        re.compile(rb"/v1/batches/" + _ID + rb"/results/" + _LINE_ID),
        _offline("batches", b"GET"),
    ),
)
# A second meaning of a path, by its method.
_OTHERWISE: Final = {(b"GET", b"/v1/chat/completions"): _stored("stored_chat", b"GET")}
# OpenAI lets the owner of a fine-tuned model delete it, and of no other: these names alone pass.
# Neither vLLM nor SGLang has such a call, so nothing that they serve can be taken away by it.
_FINE_TUNED: Final = re.compile(rb"/v1/models/ft(?:(?::|%3[Aa])[A-Za-z0-9._-]{0,64}){1,6}")
_FINE_TUNED_DELETE: Final = _stored("models", b"DELETE")


def find_route(method: bytes, path: bytes) -> Route:
    """Return the route of a raw path. Raises `NotFoundError` or `MethodNotAllowedError`."""
    route = ROUTES.get(path)
    if route is None:
        route = _find_pattern(path)
    if method not in route.methods:
        other = _OTHERWISE.get((method, path))
        if other is not None:
            return other
        if method == b"DELETE" and _FINE_TUNED.fullmatch(path):
            return _FINE_TUNED_DELETE
        also = {m for m, otherwise in _OTHERWISE if otherwise == path}
        allowed = b", ".join(sorted(route.methods | also)).decode()
        shown = method.decode("ascii", "backslashreplace")
        raise errors.MethodNotAllowedError(f"{shown} is not allowed here; use {allowed}")
    return route


def _find_pattern(path: bytes) -> Route:
    if _MODEL_PATH.fullmatch(path) and b"//" not in path and b"/." not in path:
        return _MODEL
    for pattern, route in _STORED:
        if pattern.fullmatch(path):
            return route
    for pattern, route in _KEPT:
        if pattern.fullmatch(path):
            return route
    raise unknown_path(path)


def unknown_path(path: bytes) -> errors.NotFoundError:
    """Return what is said of a path that is not served here."""
    shown = path[:200].decode("ascii", "backslashreplace")
    return errors.NotFoundError(
        f"there is no {shown} here; deploy/guides/api.md lists the paths that are served"
    )


def model_of_path(path: bytes) -> bytes:
    """Return the model named in `/v1/models/{model}`, or empty for the list."""
    match = _MODEL_PATH.fullmatch(path)
    return match[1].replace(b"%2F", b"/").replace(b"%2f", b"/") if match else b""
