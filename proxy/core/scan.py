"""What routing needs of a request body: model, stream, tier, session, and the prompt's octets.

The body is read by structure, never searched for a key: `"model":` inside a prompt is prompt. One
pass of msgspec over typed raw fields checks the whole document and leaves every value that is not
ours undecoded. Duplicate keys: the last one counts,
as in the engines' parsers. Whatever this accepts, `json.loads` reads the same way (tests hold that
law); what only some parsers accept (NaN, UTF-16, a byte order mark) is refused.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from proxy import errors
from proxy.core import limits

_NOTHING: Final = Raw()


class Scanned(msgspec.Struct, gc=False):
    """The fields of one body. The prompt's parts are raw JSON octets; what is absent is empty."""

    model: str = ""
    stream: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    lora_path: str | None = None
    messages: Raw = _NOTHING
    prompt: Raw = _NOTHING
    tools: Raw = _NOTHING
    system: Raw = _NOTHING
    instructions: Raw = _NOTHING
    query: Raw = _NOTHING
    input: Raw = _NOTHING
    documents: Raw = _NOTHING
    text_1: Raw = _NOTHING


class _Untyped(msgspec.Struct, gc=False):
    """The same fields where one of them is not of its type, to say which, or to leave it out."""

    model: Raw = _NOTHING
    stream: Raw = _NOTHING
    service_tier: Raw = _NOTHING
    prompt_cache_key: Raw = _NOTHING
    session_id: Raw = _NOTHING
    cache_salt: Raw = _NOTHING
    lora_path: Raw = _NOTHING
    messages: Raw = _NOTHING
    prompt: Raw = _NOTHING
    tools: Raw = _NOTHING
    system: Raw = _NOTHING
    instructions: Raw = _NOTHING
    query: Raw = _NOTHING
    input: Raw = _NOTHING
    documents: Raw = _NOTHING
    text_1: Raw = _NOTHING


_decoder: Final = msgspec.json.Decoder(Scanned)
_untyped: Final = msgspec.json.Decoder(_Untyped)
_string: Final[msgspec.json.Decoder[str | None]] = msgspec.json.Decoder(str | None)
_flag: Final[msgspec.json.Decoder[bool | None]] = msgspec.json.Decoder(bool | None)


def scan_body(body: bytes) -> Scanned:
    """Read a JSON request body. Raises the kinds of `errors.InvalidRequestError`."""
    try:
        if not body.isascii():
            body.decode()  # the decoder leaves text that is not ours unread; engines do not
        try:
            scanned = _decoder.decode(body)
        except msgspec.ValidationError:
            scanned = _typed(_untyped.decode(body))
    except msgspec.ValidationError as error:
        raise errors.InvalidRequestError(
            'the body must be a JSON object, such as {"model": …, "messages": […]}'
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidJSONError(f"the body is not valid JSON: {error}") from error
    if not 0 < len(scanned.model) <= limits.MODEL_BYTES_MAX // 4:  # UTF-8 takes up to four
        _judge_model(scanned.model)
    return scanned


def _judge_model(model: str) -> None:
    if not model:
        raise errors.MissingModelError(
            'the body names no model; add "model", a non-empty string', "model"
        )
    if len(model.encode()) > limits.MODEL_BYTES_MAX:
        raise errors.InvalidRequestError("the model name is too long", "model")


def _typed(raw: _Untyped) -> Scanned:
    """Judge the fields one by one. Engines take other types as a session or an adapter, too."""
    return Scanned(
        _model(raw.model),
        _stream(raw.stream),
        _text(raw.service_tier, "service_tier"),
        _text(raw.prompt_cache_key, "prompt_cache_key"),
        _text(raw.session_id, None),
        _text(raw.cache_salt, "cache_salt"),
        _text(raw.lora_path, None),
        *(getattr(raw, name) for name in _Untyped.__struct_fields__[7:]),
    )


def _model(raw: Raw) -> str:
    if not memoryview(raw):
        return ""
    model = _text(raw, "model")
    if not model:
        raise errors.MissingModelError('"model" must be a non-empty string', "model")
    return model


def _stream(raw: Raw) -> bool | None:
    if not memoryview(raw):
        return None
    try:
        return _flag.decode(raw)
    except msgspec.MsgspecError as error:
        raise errors.InvalidRequestError('"stream" must be true or false', "stream") from error


def _text(raw: Raw, name: str | None) -> str | None:
    """Decode a string or null. With a name, another type is the client's error; without, None."""
    if not memoryview(raw):
        return None
    try:
        return _string.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        if name is None:
            return None
        raise errors.InvalidRequestError(f'"{name}" must be a string', name) from error
