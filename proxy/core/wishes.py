"""What a head says of how urgent its request is: a class, times that it wants kept, its patience.

*Class.* `x-doherty-class` names one outright; `x-priority`, or `x-smg-priority` as SGLang's gateway
calls it, says it in that gateway's words (`system`, `interactive`, `default`, `bulk`) or in ours.
Words that nobody knows say nothing, as there: a typing error must not cost an answer.

*Times.* `x-slo-ttft-ms` and `x-slo-tpot-ms` are the milliseconds to the first token and between
tokens that a client wants, under the names that llm-d's inference gateway reads; SGLang's router
has its own, of which one is a rate. 0 is none. The strictest counts, because to keep it is to keep
all. Here a wrong value is the client's error (400, as in SGLang's router): who asks for a time and
is not understood would believe that it is kept.

*Patience.* OpenAI's and Anthropic's clients say for how many seconds they listen
(`x-stainless-read-timeout`, `x-stainless-timeout`). A library writes that, and nobody asked for it,
so what cannot be read is ignored; and their own default of ten minutes is nobody's wish. How often
they have tried (`x-stainless-retry-count`) is only written down.

None of these fields goes on to a replica: a time counts from here, and would be another there.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core import claim_limits
from proxy.core.classes import SPARE, UNSAID, class_of_field, class_of_priority
from proxy.core.http1 import WORK_CLASS, RequestHead
from proxy.errors import InvalidRequestError

_TTFT_MS: Final = 1
_TPOT_MS: Final = 2
_TOKENS_PER_S: Final = 3
_PATIENCE_S: Final = 4
_PRIORITY: Final = 5
_RETRIES: Final = 6

_MEANINGS: Final[dict[bytes, int]] = {
    b"x-slo-ttft-ms": _TTFT_MS,
    b"x-llm-d-slo-ttft-ms": _TTFT_MS,
    b"x-sgl-ttft-slo-ms": _TTFT_MS,
    b"x-slo-tpot-ms": _TPOT_MS,
    b"x-llm-d-slo-tpot-ms": _TPOT_MS,
    b"x-sgl-tps-slo": _TOKENS_PER_S,
    b"x-stainless-read-timeout": _PATIENCE_S,
    b"x-stainless-timeout": _PATIENCE_S,
    b"x-priority": _PRIORITY,
    b"x-smg-priority": _PRIORITY,
    b"x-stainless-retry-count": _RETRIES,
}
# Those that end here; a library's own fields go on, as all that are not ours.
_OF_LIBRARIES: Final = (_PATIENCE_S, _RETRIES)
ENDING_HERE: Final = frozenset(
    name for name, kind in _MEANINGS.items() if kind not in _OF_LIBRARIES
)

_DECIMAL: Final = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")


class Wishes:
    """What one head asks for. Seconds; 0 is none said."""

    __slots__ = ("error", "patience_s", "retries", "spare", "tpot_s", "ttft_s", "work_class")

    def __init__(self) -> None:
        self.work_class = UNSAID
        self.spare = False
        self.ttft_s = 0.0
        self.tpot_s = 0.0
        self.patience_s = 0.0
        self.retries = -1  # how often its client's library has tried already; below 0: not said
        self.error: InvalidRequestError | None = None  # told once the request is whole


def read_wishes(head: RequestHead) -> Wishes:
    """Return what the head's fields ask for. Nothing is raised: see `Wishes.error`."""
    wishes = Wishes()
    priority = UNSAID
    for name, value in head.fields:
        kind = _MEANINGS.get(name, 0)
        if not kind:
            continue
        if kind == _PRIORITY:
            named = class_of_priority(value.lower())
            if priority == UNSAID:
                priority = named
        else:
            _take_number(wishes, kind, name, value)
    if WORK_CLASS in head.special:
        named_outright = head.special[WORK_CLASS]
        wishes.work_class = class_of_field(named_outright)
        wishes.spare = named_outright == SPARE
    if wishes.work_class == UNSAID:
        wishes.work_class = priority
    return wishes


def _take_number(wishes: Wishes, kind: int, name: bytes, value: bytes) -> None:
    number = float(value) if _DECIMAL.fullmatch(value) else -1.0
    if kind == _RETRIES:
        if number >= 0.0:
            wishes.retries = int(number)
        return
    if kind == _PATIENCE_S:
        if 0.0 < number < claim_limits.CLIENT_PATIENCE_DEFAULT_S:
            wishes.patience_s = _stricter(wishes.patience_s, number)
        return
    if number < 0.0:
        shown = name.decode("ascii")
        unit = "tokens per second" if kind == _TOKENS_PER_S else "milliseconds"
        wishes.error = InvalidRequestError(f"{shown} must be a number of {unit}", shown)
    elif number > 0.0 and kind == _TTFT_MS:
        wishes.ttft_s = _stricter(wishes.ttft_s, number / 1e3)
    elif number > 0.0:
        tpot_s = 1.0 / number if kind == _TOKENS_PER_S else number / 1e3
        wishes.tpot_s = _stricter(wishes.tpot_s, tpot_s)


def _stricter(one_s: float, other_s: float) -> float:
    """Return the lesser of two times, of which the first may be none."""
    return min(one_s, other_s) if one_s else other_s
