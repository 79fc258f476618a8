"""What routing needs of a request body: model, stream, tier, session, and the prompt's octets.

The body is read by structure, never searched for a key: `"model":` inside a prompt is prompt. One
pass checks the whole document and leaves every value that is not ours undecoded. Duplicate keys:
the last one counts, as in the engines' parsers. Whatever this accepts, `json.loads` reads the same
way (tests hold that law); what only some parsers accept (NaN, UTF-16, a byte order mark) is
refused.

There are two readers with the same verdicts. `_scan.c`, where `doherty compile` has built it,
refuses what is not JSON and reads bodies of the usual form. msgspec, over typed raw fields, reads
the unusual ones, and everything where the first is not built. Only the depth that each allows
differs: 512 levels there, and here what is left of the interpreter's thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Raw

from proxy import errors
from proxy.core import body_wire, claim_limits, limits, media
from proxy.core.body_wire import NOTHING, Typed, Untyped

_Ends = tuple[int, ...]
_Fields = tuple[
    str, str | None, str | None, str | None, str | None, str | None, str | None,
    bool | None, tuple[int, ...], _Ends, _Ends, tuple[int, ...], int,
]  # fmt: skip
_Reader = Callable[[bytes], _Fields | None]

_read: _Reader | None
try:
    from proxy.core._scan import scan as _read
except ImportError:
    _read = None

# The parts of a prompt, by their place in `Scanned.spans`.
MESSAGES: Final = 0
PROMPT: Final = 1
TOOLS: Final = 2
SYSTEM: Final = 3
INSTRUCTIONS: Final = 4
QUERY: Final = 5
INPUT: Final = 6
DOCUMENTS: Final = 7
TEXT_1: Final = 8
INPUT_IDS: Final = 9
SESSION_PARAMS: Final = 10

_SPACE: Final = b" \t\r\n"


class Scanned:
    """The fields of one body. The prompt's parts are raw JSON octets; what is absent is empty.

    Part `i` is `octets[spans[2 * i] : spans[2 * i + 1]]`, and is not copied to be named. Where the
    last elements of the messages and of the input end in `octets` is in `message_ends` and
    `input_ends`, in rising order; both are empty where the part is no array. `media` are the
    regions of data within the parts, four numbers each: see `media.py`. `output_tokens` is how many
    the answer may have in all its choices, as far as the body says it in numbers; 0: it does not.
    """

    __slots__ = (
        "cache_salt", "input_ends", "lora_path", "media", "message_ends", "model", "octets",
        "output_tokens", "previous_response_id", "prompt_cache_key", "service_tier", "session_id",
        "spans", "stream",
    )  # fmt: skip

    def __init__(self, fields: _Fields, octets: bytes) -> None:
        self.model = fields[0]
        self.service_tier = fields[1]
        self.prompt_cache_key = fields[2]
        self.session_id = fields[3]
        self.cache_salt = fields[4]
        self.lora_path = fields[5]
        self.previous_response_id = fields[6]
        self.stream = fields[7]
        self.spans = fields[8]
        self.message_ends = fields[9]
        self.input_ends = fields[10]
        self.media = fields[11]
        self.output_tokens = fields[12]
        self.octets = octets

    def has(self, part: int) -> bool:
        return self.spans[2 * part] < self.spans[2 * part + 1]

    @property
    def media_bytes(self) -> int:
        """The octets of pictures and sound within the parts."""
        return sum(self.media[media.OCTETS :: media.FIELDS])

    @property
    def media_parts(self) -> int:
        """How many pictures and pieces of sound there are."""
        return sum(self.media[media.STRINGS :: media.FIELDS])

    def longest(self) -> tuple[int, int]:
        """Return where the longest part begins and ends."""
        start = end = 0
        for at in range(0, len(self.spans), 2):
            if self.spans[at + 1] - self.spans[at] > end - start:
                start, end = self.spans[at], self.spans[at + 1]
        return start, end

    def part(self, part: int) -> bytes:
        """Return a copy of one part."""
        return self.octets[self.spans[2 * part] : self.spans[2 * part + 1]]


def scan_body(body: bytes) -> Scanned:
    """Read a JSON request body. Raises the kinds of `errors.InvalidRequestError`."""
    return scan_with(_read, body)


def scan_with(read: _Reader | None, body: bytes) -> Scanned:
    """The same by a given reader, or by msgspec alone."""
    fields: _Fields | None = None
    if read is not None:
        try:
            fields = read(body)
        except ValueError as error:
            raise errors.InvalidJSONError(f"the body is not valid JSON: {error}") from error
    scanned = _scan_any(body) if fields is None else Scanned(fields, body)
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


def _scan_any(body: bytes) -> Scanned:
    """Read a body of any form through msgspec, and judge its types."""
    try:
        if not body.isascii():
            body.decode()  # the decoder leaves text that is not ours unread; engines do not
        try:
            typed = body_wire.decoder.decode(body)
        except msgspec.ValidationError:
            typed = _typed(body_wire.untyped.decode(body))
    except msgspec.ValidationError as error:
        raise errors.InvalidRequestError(
            'the body must be a JSON object, such as {"model": …, "messages": […]}'
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidJSONError(f"the body is not valid JSON: {error}") from error
    octets, spans = _placed((
        typed.messages, typed.prompt, typed.tools, typed.system, typed.instructions, typed.query,
        typed.input, typed.documents, typed.text_1, typed.input_ids, typed.session_params,
    ))  # fmt: skip
    fields = (
        typed.model, typed.service_tier, typed.prompt_cache_key, typed.session_id,
        typed.cache_salt, typed.lora_path, typed.previous_response_id, typed.stream, spans,
        element_ends(octets, spans[2 * MESSAGES], spans[2 * MESSAGES + 1]),
        element_ends(octets, spans[2 * INPUT], spans[2 * INPUT + 1]),
        _media(octets, spans), _output_tokens(typed),
    )  # fmt: skip
    return Scanned(fields, octets)


def _placed(parts: tuple[Raw, ...]) -> tuple[bytes, tuple[int, ...]]:
    """Put the parts one behind another, because msgspec does not say where in the body they lie."""
    present: list[Raw] = []
    spans: list[int] = []
    end = 0
    for part in parts:
        start = end
        if part is not NOTHING:
            present.append(part)
            end += len(memoryview(part))
        spans.append(start)
        spans.append(end)
    return b"".join(present), tuple(spans)


def _media(octets: bytes, spans: tuple[int, ...]) -> tuple[int, ...]:
    if len(octets) < media.WEIGHT_BYTES:
        return ()
    found: list[int] = []
    for at in range(0, len(spans), 2):
        if spans[at + 1] - spans[at] > media.WEIGHT_BYTES:
            found += media.find_media(octets, spans[at], spans[at + 1])
    return tuple(found)


def element_ends(octets: bytes, begin: int, end: int) -> _Ends:
    """Return where the last elements of the array `octets[begin:end]` end; none of what is none."""
    if begin == end or octets[begin : begin + 1] != b"[":
        return ()
    start = _tail_start(octets, begin, end)
    elements = _last_elements(octets, begin, start, end)
    if len(elements) < limits.CHAIN_BOUNDARIES_MAX and start > begin + 1:
        elements = _last_elements(octets, begin, begin + 1, end)
    ends: list[int] = []
    at = _space_start(octets, end - 1)
    for element in reversed(elements[-limits.CHAIN_BOUNDARIES_MAX :]):
        ends.append(at)
        at -= len(memoryview(element))
        if octets[at - 1] in _SPACE:
            at = _space_start(octets, at)
        at -= 1  # the comma, or the opening bracket
        if at > begin and octets[at - 1] in _SPACE:
            at = _space_start(octets, at)
    ends.reverse()
    return tuple(ends)


def _tail_start(octets: bytes, begin: int, end: int) -> int:
    """Return where the last messages of the usual form begin, so that not all need to be read.

    Where there are not so many, it is where the array's elements do.
    A search is enough: within a string every quote is escaped, so this opens an object. Whether
    it is an element of the array shows when the rest is read.
    """
    at = end
    for _ in range(limits.CHAIN_BOUNDARIES_MAX):
        at = octets.rfind(b'{"role":', begin, at)
        if at < 0:
            return begin + 1
    return at


def _last_elements(octets: bytes, begin: int, start: int, end: int) -> list[Raw]:
    """Return the elements from `start`; none where that is within one, or where they are too many.

    Naming each of many numbers would take thirty times their memory. Nor is anything copied that
    need not be: several large bodies at once are what memory is reckoned for.
    """
    most = limits.ELEMENTS_NAMED_MAX
    if end - start > 2 * most and octets.count(b",", start, end) > most:
        return []
    view = memoryview(octets)
    try:
        if start == begin + 1:
            return body_wire.elements.decode(view[begin:end])
        return body_wire.elements.decode(b"".join((b"[", view[start:end])))
    except msgspec.DecodeError:
        return []


def _space_start(octets: bytes, at: int) -> int:
    """Return where the space that ends at `at` begins; something else is before it."""
    if octets[at - 2] not in _SPACE:
        return at - (octets[at - 1] in _SPACE)
    size = 16
    while octets[at - 1] in _SPACE:
        before = octets[max(0, at - size) : at]
        at -= len(before) - len(before.rstrip(_SPACE))
        size *= 4
    return at


def session_params_id(scanned: Scanned) -> str | None:
    """Return SGLang's id of a session of its own, or None."""
    octets = scanned.part(SESSION_PARAMS)
    if not octets:
        return None
    try:
        return body_wire.session_params.decode(octets).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # the engine judges it


def _typed(raw: Untyped) -> Typed:
    """Judge the fields one by one. Engines take other types as a session or an adapter, too."""
    return Typed(
        _model(raw.model),
        _text(raw.service_tier, "service_tier"),
        _text(raw.prompt_cache_key, "prompt_cache_key"),
        _text(raw.session_id, None),
        _text(raw.cache_salt, "cache_salt"),
        _text(raw.lora_path, None),
        _text(raw.previous_response_id, None),
        _stream(raw.stream),
        *(getattr(raw, name) for name in Untyped.__struct_fields__[8:]),
    )


def _output_tokens(typed: Typed) -> int:
    """Which of the names counts differs among engines: the largest bounds them all."""
    names = (typed.max_tokens, typed.max_completion_tokens, typed.max_output_tokens)
    most = max([_count(raw) for raw in names])
    return min(most * max(1, _count(typed.n)), claim_limits.OUTPUT_TOKENS_MAX)


def _count(raw: Raw) -> int:
    """Return a number of at least 0 without its fraction; 0 of what is none: engines judge it."""
    if not memoryview(raw):
        return 0
    try:
        number = body_wire.number.decode(raw)
    except msgspec.MsgspecError:
        return 0
    return max(0, int(min(number, claim_limits.OUTPUT_TOKENS_MAX)))


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
        return body_wire.flag.decode(raw)
    except msgspec.MsgspecError as error:
        raise errors.InvalidRequestError('"stream" must be true or false', "stream") from error


def _text(raw: Raw, name: str | None) -> str | None:
    """Decode a string or null. With a name, another type is the client's error; without, None."""
    if not memoryview(raw):
        return None
    try:
        return body_wire.string.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        if name is None:
            return None
        raise errors.InvalidRequestError(f'"{name}" must be a string', name) from error
