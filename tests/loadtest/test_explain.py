"""Dry runs beside what becomes of requests: what counts as equal, and a short run."""

from __future__ import annotations

import sys

import msgspec
import orjson
import pytest

from loadtest.explain import Choice, Options, Pair, came, compare, foretold, table
from loadtest.run import RunError
from loadtest.wire import AnswerReader

FORETOLD = {
    "held": False,
    "decision": {
        "replica": "a", "reason": "prefix", "cached_tokens": 9, "uncached_tokens": 1,
        "price_s": 0.5,
    },
}  # fmt: skip
CAME = {
    "x-doherty-replica": "a", "x-doherty-decision": "prefix", "x-doherty-cached-tokens": "9",
    "x-doherty-uncached-tokens": "1", "x-doherty-price-s": "0.400000",
}  # fmt: skip


def answered(value: object = None, status: int = 200, **headers: str) -> AnswerReader:
    reader = AnswerReader()
    reader.status, reader.headers, reader.body = status, dict(headers), orjson.dumps(value)
    return reader


def test_both_sides_are_read_into_the_same_words() -> None:
    assert foretold(answered(FORETOLD)) == (Choice("a", "prefix", 9, 1), 0.5)
    assert came(answered(**CAME)) == (Choice("a", "prefix", 9, 1), 0.4)
    assert foretold(answered({"held": True})) == (Choice(waits=True), 0.0)
    assert came(answered(**CAME, **{"x-doherty-queue-reason": "busy"}))[0] == Choice(waits=True)


@pytest.mark.parametrize("answer", [answered(status=503), answered({"held": 0, "decision": None})])
def test_a_dry_run_that_says_nothing_fails_the_run(answer: AnswerReader) -> None:
    with pytest.raises(RunError):
        foretold(answer)
    with pytest.raises(RunError):
        came(answer)


def test_a_difference_is_counted_and_shown() -> None:
    one = Choice("a", "prefix", 9, 1)
    pairs = [
        Pair(one, one, 0.01, off_s=0.002),
        Pair(one, msgspec.structs.replace(one, replica="b"), 0.01),
        Pair(Choice(waits=True), Choice(waits=True), 0.01),
    ]
    text = table(pairs, Options())
    assert text.startswith("2 of 3 requests")
    assert "prefix             2      1" in text
    assert "waits              1      1" in text
    assert "0 of 1, at most 2.000 ms off" in text
    assert "came Choice(replica='b'" in text


async def test_a_dry_run_is_what_happens() -> None:
    options = Options(
        requests=60, replicas=2, streams=4, renew_every=20, profile="fast", input_tokens_max=4096,
        settle_s=0.01, time_scale=1.0, doherty=f"{sys.executable} -m backends.cli",
    )  # fmt: skip
    pairs = await compare(options, lambda _: None)
    assert len(pairs) == 60
    assert [pair for pair in pairs if not pair.equal] == []
    assert len({pair.real.replica for pair in pairs}) > 1
    assert len({pair.real.reason for pair in pairs}) > 2
