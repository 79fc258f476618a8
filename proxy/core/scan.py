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


class _Body(msgspec.Struct, gc=False):
    model: Raw = Raw()
    stream: Raw = Raw()
    messages: Raw = Raw()
    prompt: Raw = Raw()
    input: Raw = Raw()
    tools: Raw = Raw()
    system: Raw = Raw()
    instructions: Raw = Raw()
    service_tier: Raw = Raw()
    prompt_cache_key: Raw = Raw()
    session_id: Raw = Raw()
    cache_salt: Raw = Raw()
    lora_path: Raw = Raw()
    query: Raw = Raw()
    documents: Raw = Raw()
    text_1: Raw = Raw()


class Scanned:
    """The fields of one body. Strings are decoded; the prompt's parts are raw JSON octets."""

    __slots__ = (
        "cache_salt",
        "instructions",
        "lora_path",
        "messages",
        "model",
        "parts",
        "prompt",
        "prompt_cache_key",
        "service_tier",
        "session_id",
        "stream",
        "system",
        "tools",
    )

    model: str
    stream: bool
    service_tier: str | None
    prompt_cache_key: str | None
    session_id: str | None
    cache_salt: str | None
    lora_path: str | None
    messages: bytes
    prompt: bytes
    parts: tuple[bytes, ...]  # input, query, documents, text_1: whatever was given
    tools: bytes
    system: bytes
    instructions: bytes


_decoder: Final = msgspec.json.Decoder(_Body)
_string: Final[msgspec.json.Decoder[str | None]] = msgspec.json.Decoder(str | None)
_flag: Final[msgspec.json.Decoder[bool | None]] = msgspec.json.Decoder(bool | None)


def scan_body(body: bytes) -> Scanned:
    """Read a JSON request body. Raises the kinds of `errors.InvalidRequestError`."""
    try:
        if not body.isascii():
            body.decode()  # the decoder leaves text that is not ours unread; engines do not
        raw = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise errors.InvalidRequestError(
            'the body must be a JSON object, such as {"model": …, "messages": […]}'
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidJSONError(f"the body is not valid JSON: {error}") from error
    scanned = Scanned()
    scanned.model = _model(raw.model)
    scanned.stream = _stream(raw.stream)
    scanned.service_tier = _text(raw.service_tier, "service_tier")
    scanned.prompt_cache_key = _text(raw.prompt_cache_key, "prompt_cache_key")
    # Engines take other types here too; those name no session of ours.
    scanned.session_id = _text(raw.session_id, None)
    scanned.lora_path = _text(raw.lora_path, None)
    scanned.cache_salt = _text(raw.cache_salt, "cache_salt")
    scanned.messages = bytes(raw.messages)
    scanned.prompt = bytes(raw.prompt)
    scanned.tools = bytes(raw.tools)
    scanned.system = bytes(raw.system)
    scanned.instructions = bytes(raw.instructions)
    scanned.parts = (bytes(raw.query), bytes(raw.input), bytes(raw.documents), bytes(raw.text_1))
    return scanned


def _model(raw: Raw) -> str:
    value = memoryview(raw)
    if not value:
        raise errors.MissingModelError('the body names no model; add "model"', "model")
    if len(value) > limits.MODEL_BYTES_MAX:
        raise errors.InvalidRequestError("the model name is too long", "model")
    model = _text(raw, "model")
    if not model:
        raise errors.MissingModelError('"model" must be a non-empty string', "model")
    return model


def _stream(raw: Raw) -> bool:
    if not memoryview(raw):
        return False
    try:
        return bool(_flag.decode(raw))
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
