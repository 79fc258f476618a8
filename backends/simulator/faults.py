"""How the engine misbehaves on purpose: a small grammar, and which request meets which fault.

A fault is `KIND[:N][:p=P][:times=K]`: with probability P (1 if not given), for at most K requests,
the next generation request meets it. Of several faults the first that strikes wins.

    refuse        close the connection without an answer
    status:N      answer the HTTP status N and an error body
    delay:S       answer S seconds later (real seconds)
    stall:N       send N chunks, then nothing, and keep the connection open (0: not even a head)
    cut:N         send N chunks, then close the connection in the middle
    garbage:N     send N chunks, then bytes that are not HTTP (0: instead of an answer)
    error:N       send N chunks, then an error event and the end of the stream
    exit:N        end the process, exit code 1, after N chunks (0: at once)
    slow:F        not for requests: every step takes F times as long
    sick          not for requests: /health answers 503

An answer that is not streamed counts as one chunk; it is cut in its middle.
"""

from __future__ import annotations

import random
import re
from typing import Literal, get_args

import msgspec

Kind = Literal[
    "refuse", "status", "delay", "stall", "cut", "garbage", "error", "exit", "slow", "sick"
]
_STANDING = ("slow", "sick")
_AMOUNT_NEEDED = ("status", "delay", "slow")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


class FaultError(ValueError):
    """The text is not a fault; the message says what one looks like."""


class Fault(msgspec.Struct, frozen=True):
    """One fault as asked for."""

    kind: Kind
    amount: float = 0.0
    probability: float = 1.0
    times: int = 0  # 0: no limit

    @property
    def standing(self) -> bool:
        """Whether it is a state of the engine, not something that happens to a request."""
        return self.kind in _STANDING


def parse_fault(text: str) -> Fault:
    """Return the fault that `text` asks for. Raises `FaultError`."""
    kind, *options = text.split(":")
    if kind not in get_args(Kind):
        raise FaultError(f"unknown fault '{kind}'; use one of {', '.join(get_args(Kind))}")
    amount: float | None = None
    probability, times = 1.0, 0
    for option in options:
        name, _, value = option.rpartition("=")
        if not _NUMBER.fullmatch(value):
            raise FaultError(f"fault '{text}': '{option}' is not N, p=N or times=N")
        if name == "p" and float(value) <= 1:
            probability = float(value)
        elif name == "times" and value.isdecimal():
            times = int(value)
        elif not name and amount is None:
            amount = float(value)
        else:
            raise FaultError(f"fault '{text}': '{option}' is not N, p=0..1 or times=N")
    if amount is None and kind in _AMOUNT_NEEDED:
        raise FaultError(f"fault '{text}' needs a number, such as '{kind}:2'")
    if kind == "status" and not 400 <= (amount or 0) <= 599:
        raise FaultError(f"fault '{text}': the status must be 400 to 599")
    if kind == "slow" and not amount:
        raise FaultError(f"fault '{text}': the factor must be above 0")
    return Fault(kind, amount or 0.0, probability, times)  # type: ignore[arg-type]  # checked above


class FaultPlan:
    """The faults in force. Chances are drawn from a seeded source: same order, same faults."""

    def __init__(self, texts: tuple[str, ...], seed: int) -> None:
        self._seed = seed
        self.texts: tuple[str, ...] = ()
        self._faults: tuple[Fault, ...] = ()
        self._struck: dict[int, int] = {}
        self._random = random.Random(seed)
        self.replace(texts)

    def replace(self, texts: tuple[str, ...]) -> None:
        """Put other faults in force, with fresh counts and chances. Raises `FaultError`."""
        faults = tuple(parse_fault(text) for text in texts)
        self.texts, self._faults = texts, faults
        self._struck = {}
        self._random = random.Random(self._seed)

    @property
    def sick(self) -> bool:
        """Whether /health must fail."""
        return any(fault.kind == "sick" for fault in self._faults)

    @property
    def slowdown(self) -> float:
        """By how much every step is longer."""
        factors = [fault.amount for fault in self._faults if fault.kind == "slow"]
        return factors[0] if factors else 1.0

    def strike(self) -> Fault | None:
        """Return the fault that the next request meets."""
        for index, fault in enumerate(self._faults):
            if fault.standing or (fault.times and self._struck.get(index, 0) >= fault.times):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            self._struck[index] = self._struck.get(index, 0) + 1
            return fault
        return None
