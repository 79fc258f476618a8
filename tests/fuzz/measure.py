"""Processor time and exhaustive cuts: figures that are printed, not promises of a default test."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from proxy.core import limits
from tests.conformance.engine_vectors import ENGINE
from tests.conformance.reader import RequestReader, cut_at, read_requests, read_response
from tests.conformance.vector import HOST, LINE
from tests.conformance.vectors import REQUESTS
from tests.fuzz.targets import TARGETS, kept

COST_MS_MAX: Final = 10.0  # of processor time, for each begun 64 KiB
_UNIT_BYTES: Final = 64 * limits.KIB
_REPEATS: Final = 3


def _spent_ms(read: Callable[[bytes], object], octets: bytes) -> float:
    """Return the least of a few runs: what is more was somebody else's."""
    best = float("inf")
    for _ in range(_REPEATS):
        started_s = time.process_time()
        read(octets)
        best = min(best, time.process_time() - started_s)
    return best * 1e3


def _grown(name: str) -> Iterator[tuple[str, bytes]]:
    """Repeat every seed up to the size that the bound speaks of, and hostile patterns with it.

    Not whole requests: many of them are much work, and meant to be.
    """
    for number, octets in enumerate(TARGETS[name].seeds()):
        if octets and not (name == "requests" and read_requests([octets]).taken):
            yield f"grown {number}", (octets * (_UNIT_BYTES // len(octets) + 1))[:_UNIT_BYTES]
    for pattern in _PATTERNS.get(name, ()):
        before, unit, after = pattern
        room = _UNIT_BYTES - len(before) - len(after)
        yield f"pattern {unit!r}", before + (unit * (room // len(unit) + 1))[:room] + after


_ARRAY: Final = b'{"model":"m","messages":['
_TEXT: Final = b'{"model":"m","messages":["'
_JSON: Final = (
    (_ARRAY, b'"",', b'""]}'),
    (_ARRAY, b'{"a":1},', b"{}]}"),
    (_ARRAY, b'{"role":1},', b"1]}"),
    (_ARRAY, b'"user",', b"1]}"),
    (_ARRAY, b'{"content":{"role":"user"}},', b"1]}"),
    (_ARRAY, b" ", b"1]}"),
    (_ARRAY, b"1,", b"1]}"),
    (_ARRAY + b"1", b" ", b"]}"),
    (_TEXT, b"\\\\", b'"]}'),
    (_TEXT, b'\\"', b'"]}'),
    (b'{"model":"m"', b',"a":1', b"}"),
    (b'{"model":"m","a":', b"[", b"]"),
    (b'{"model":"m","a":', b"9", b"}"),
)
_CHUNKED: Final = LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
_STREAM: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_PATTERNS: Final[dict[str, tuple[tuple[bytes, bytes, bytes], ...]]] = {
    "body": _JSON,
    "chain": _JSON,
    "requests": (
        (_CHUNKED, b"1\r\nx\r\n", b"0\r\n\r\n"),
        (_CHUNKED, b"1;a\r\nx\r\n", b"0\r\n\r\n"),
        (LINE + HOST, b"a:\r\n", b"\r\n"),
    ),
    "answers": (
        (_STREAM, b"1\r\nx\r\n", b"0\r\n\r\n"),
        (_STREAM, b"1;a\r\nx\r\n", b"0\r\n\r\n"),
        (_STREAM + b"0\r\n", b"a:b\r\n", b"\r\n"),
    ),
    "usage": ((b"", b'"usage"', b""), (b"", b'"usage":{', b""), (b'"usage":{', b"{}", b"")),
}


def cost(name: str | None, corpus: Path | None) -> int:
    """Time every input of a target, or of all; return 1 when one is over the bound."""
    over = 0
    for target_name in [name] if name else sorted(TARGETS):
        read = TARGETS[target_name].read
        inputs = [*kept(target_name), *_grown(target_name)]
        inputs += [(f"seed {n}", octets) for n, octets in enumerate(TARGETS[target_name].seeds())]
        if corpus is not None:
            inputs += [(str(path), path.read_bytes()) for path in corpus.iterdir()]
        worst, label = 0.0, ""
        for where, octets in inputs:
            share = _spent_ms(read, octets) / (1 + max(0, len(octets) - 1) // _UNIT_BYTES)
            if share > worst:
                worst, label = share, where
        over += worst > COST_MS_MAX
        print(f"{target_name:14} {len(inputs):6} inputs, worst {worst:7.3f} ms ({label})")
    return 1 if over else 0


class _Flood:
    """One head of a mebibyte in small pieces, as the connection's reader takes it."""

    def __init__(self, piece_bytes: int) -> None:
        octets = LINE + HOST + b"X: " + b"y" * limits.MIB
        self._pieces = cut_at(octets, range(0, len(octets), piece_bytes))
        self.reader = RequestReader()
        self.fed_bytes = 0

    def run(self) -> None:
        for piece in self._pieces:
            self.reader.feed(piece)
            if not self.reader.refused:
                self.fed_bytes += len(piece)


def flood() -> int:
    """Print what a mebibyte of one field's value costs until, and after, it is refused."""
    for piece_bytes in (1, 16, 64, 1024, 65536):
        trial = _Flood(piece_bytes)
        started_s = time.process_time()
        trial.run()
        spent_ms = (time.process_time() - started_s) * 1e3
        print(f"pieces of {piece_bytes:6}: {trial.reader.refused} after {trial.fed_bytes} octets, "
              f"{spent_ms:7.2f} ms")  # fmt: skip
    return 0


def cuts(short_bytes: int = 220) -> int:
    """Cut every short vector at every two places; return 1 when a verdict differs."""
    runs = differing = 0
    for vector in REQUESTS:
        if len(vector.octets) > short_bytes:
            continue
        whole = read_requests([vector.octets])
        for pair in itertools.combinations(range(1, len(vector.octets)), 2):
            runs += 1
            if read_requests(cut_at(vector.octets, pair)) != whole:
                differing += 1
                print(f"{vector.name} differs at {pair}")
    for vector_of_engine in ENGINE:
        octets = vector_of_engine.octets
        if len(octets) > short_bytes:
            continue
        whole_answer = read_response([octets])
        for pair in itertools.combinations(range(1, len(octets)), 2):
            runs += 1
            got = read_response(cut_at(octets, pair))
            same = (got.status, got.ended, got.surplus, got.failed)
            if same != (whole_answer.status, whole_answer.ended, whole_answer.surplus,
                        whole_answer.failed):  # fmt: skip
                differing += 1
                print(f"{vector_of_engine.name} differs at {pair}")
    print(f"{runs} runs, {differing} differ")
    return 1 if differing else 0
