"""What an answer means for a line, when a job is late, which models share replicas, the pace."""

from __future__ import annotations

import math

import msgspec
import pytest

from backends.offline.answers import FAILURES_MAX, Again, Answered, judge
from backends.offline.holds import HeldChunk, Pace
from backends.offline.region_watch import asked_of, groups_of
from backends.offline.urgency import START_S, TOKENS_PER_S_MIN, Speed, Urgency, first_late
from backends.offline.work import Chunk, JobNeed, Line, Receipt, Result
from backends.scaling_report import DemandReport, ModelReport
from proxy.contract import FleetSnapshot, PoolRecord, ReplicaRecord, ReplicaState
from proxy.contract.demand import ModelDemand

LINE = Line("batch_1", 3, "/v1/chat/completions", msgspec.Raw(b'{"model":"m"}'))


def error(code: str) -> bytes:
    return msgspec.json.encode({"error": {"message": "no", "code": code}})


@pytest.mark.parametrize(
    ("answered", "fate"),
    [
        (Answered(status=429, body=error("no_spare_capacity"), retry_after="3"), (3.0, "full")),
        (Answered(status=429, body=b"busy"), (1.0, "full")),
        (Answered(status=408, body=error("queue_timeout")), (1.0, "full")),
        (Answered(status=503, body=error("preempted"), retry_after="1"), (1.0, "preempted")),
        (Answered(status=503, body=error("not_awake"), retry_after="999"), (120.0, "full")),
        (Answered(status=404, body=error("model_not_found")), (1.0, "full")),
        (Answered(status=401, body=error("invalid_api_key")), (60.0, "refused_us")),
        (Answered(status=500, body=b"{}"), (0.5, "failed")),
        (Answered(status=502, body=b"<html>", retry_after="Fri, 27 Nov"), (0.5, "failed")),
        (Answered(status=200, body=b"half an ans"), (0.5, "failed")),
        (Answered(status=0, problem="ClientOSError: reset"), (0.5, "failed")),
    ],
)
def test_what_is_done_again(answered: Answered, fate: tuple[float, str]) -> None:
    again = judge(LINE, answered, 0)
    assert isinstance(again, Again)
    told = {name: getattr(again, name) for name in ("full", "preempted", "refused_us", "failed")}
    assert again.wait_s == fate[0]
    assert told == {name: name == fate[1] for name in told}


@pytest.mark.parametrize(
    ("status", "body", "due"),
    [
        (400, error("context_length_exceeded"), error("context_length_exceeded")),
        (404, b'{"error":"no such path"}', b'{"error":"no such path"}'),
        (
            413,
            b"too large\n",
            b'{"error":{"message":"too large\\n","type":"invalid_request_error","param":null,'
            b'"code":null}}',
        ),
        (
            422,
            b"",
            b'{"error":{"message":"status 422","type":"invalid_request_error","param":null,'
            b'"code":null}}',
        ),
    ],
)
def test_what_asking_again_would_not_better_is_the_result(
    status: int, body: bytes, due: bytes
) -> None:
    result = judge(LINE, Answered(status=status, body=body, request_id="r"), 0)
    assert result == Result(
        job_id="batch_1", number=3, status=status, request_id="r", body=msgspec.Raw(due)
    )


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (b"", (0, 0, 0)),
        (b',"usage":{"prompt_tokens":5,"completion_tokens":2}', (5, 0, 2)),
        (
            b',"usage":{"input_tokens":5,"output_tokens":2,'
            b'"input_tokens_details":{"cached_tokens":4}}',
            (5, 4, 2),
        ),
        (b',"usage":{"prompt_tokens":-5}', (0, 0, 0)),
        (b',"usage":{"prompt_tokens":%d}' % 2**63, (0, 0, 0)),
        (b',"usage":"much"', (0, 0, 0)),
        (b',"usage":null', (0, 0, 0)),
    ],
)
def test_an_answer_is_the_result_on_one_line_with_what_it_cost(
    usage: bytes, tokens: tuple[int, int, int]
) -> None:
    body = b'{\n "id": "x"' + usage + b"\r\n}"
    result = judge(LINE, Answered(status=200, body=body), 0)
    assert isinstance(result, Result)
    assert bytes(result.body) == b'{"id":"x"' + usage + b"}"
    assert (result.prompt_tokens, result.cached_tokens, result.completion_tokens) == tokens


def test_a_line_that_fails_often_enough_has_its_error() -> None:
    lost = Answered(status=0, problem="ClientOSError: reset")
    waits = []
    for failures in range(FAILURES_MAX - 1):
        again = judge(LINE, lost, failures)
        assert isinstance(again, Again)
        waits.append(again.wait_s)
    assert waits == sorted(waits)
    result = judge(LINE, lost, FAILURES_MAX - 1)
    assert isinstance(result, Result)
    assert result.error is not None
    assert "ClientOSError: reset" in result.error.message
    told = judge(LINE, Answered(status=500, body=error("boom")), FAILURES_MAX - 1)
    assert isinstance(told, Result)
    assert (told.status, bytes(told.body), told.error) == (500, error("boom"), None)


def need(due_in_s: float, tokens: int) -> JobNeed:
    return JobNeed(due_in_s=due_in_s, lines=1, tokens=tokens)


def test_what_is_due_first_is_done_first_and_all_before_it_count() -> None:
    needs = [need(1000, 400_000), need(100, 50_000)]
    assert first_late(needs, 1000.0, awake=True) is None
    assert first_late(needs, 900.0, awake=True) == needs[1]
    needs[1] = need(200, 50_000)
    assert first_late(needs, 850.0, awake=True) == needs[0], "what comes first is in its way"
    assert first_late([need(100, 10_000)], 1000.0, awake=True) is None
    assert first_late([need(100, 10_000)], 1000.0, awake=False), "a start takes longer"
    assert first_late([need(START_S + 25, 10_000)], 1000.0, awake=False) is None
    assert first_late([JobNeed(due_in_s=0, lines=0, tokens=0)], 1000.0, awake=False) is None


def test_the_best_minute_counts_and_no_shorter_time() -> None:
    speed = Speed()
    for second in range(30):
        speed.note(5000 * second, float(second))
    assert speed.tokens_per_s == 5000
    assert speed.best_tokens_per_s == TOKENS_PER_S_MIN
    for second in range(30, 90):
        speed.note(5000 * second, float(second))
    for second in range(90, 200):
        speed.note(5000 * 89, float(second))
    assert speed.tokens_per_s == 0
    assert speed.best_tokens_per_s == 5000


def test_a_job_stays_moved_up_until_it_is_done_however_fast_it_goes_now() -> None:
    urgency = Urgency()
    assert urgency.look([need(100, 200_000)], 1000.0, 0.0, awake=True)
    assert urgency.look([need(50, 1000)], 9000.0, 50.0, awake=True), "it is the same one"
    assert not urgency.look([need(500, 1000)], 9000.0, 60.0, awake=True), "that one is not late"


def test_models_that_share_replicas_are_one_group() -> None:
    def replica(name: str, pool: str, *models: str, **fields: object) -> ReplicaRecord:
        record = ReplicaRecord(replica_id=name, url="http://r", pool=pool, models=models)
        return msgspec.structs.replace(record, **fields)

    fleet = FleetSnapshot(
        epoch="e",
        version=1,
        replicas=(
            replica("a-0", "a", "m", "sql"),
            replica("a-1", "a", "m", asleep=True),
            replica("b-0", "b", "m", state=ReplicaState.DRAINING),
            replica("c-0", "c", "other"),
            replica("d-0", "d"),
        ),
        pools=(PoolRecord(model="zero", pool="z"), PoolRecord(model="m", pool="a")),
    )
    groups = groups_of(fleet)
    assert {name: group.names for name, group in groups.items()} == {
        "m": ("m", "sql"),
        "other": ("other",),
        "zero": ("zero",),
    }
    assert [each.replica_id for each in groups["m"].replicas] == ["a-0"]
    assert groups["zero"].replicas == ()
    demand = ModelDemand(in_flight=2, queued=1, arrivals_total=5, spare=9)
    report = DemandReport(
        proxies=1,
        models={
            "m": ModelReport(demand=demand, kv_target=0.5),
            "sql": ModelReport(demand=demand, panicking=True),
            "other": ModelReport(demand=demand),
        },
    )
    asked = asked_of(report, groups["m"].names)
    assert (asked.in_flight, asked.queued, asked.arrivals_total) == (4, 2, 10)
    assert (asked.panicking, asked.kv_target) == (True, 0.5)
    assert asked_of(report, ("zero",)).in_flight == 0


@pytest.mark.parametrize("at_once", [0.0, 6000.0])
def test_prompts_begin_at_their_pace_and_none_is_too_large_for_it(at_once: float) -> None:
    pace, now_s, begun = Pace(at_s=0.0), 0.0, list[float]()
    while now_s < 100.0:
        wait_s = pace.wait_s(1000.0, at_once, now_s)
        if wait_s:
            now_s += wait_s + 1e-9
        else:
            pace.begin(2500)
            begun.append(now_s)
    assert 95_000 <= 2500 * len(begun) <= 105_000
    together = len(begun) / len(set(begun))
    assert together == (3.0 if at_once else 1.0), "what is saved up begins in one step"
    assert pace.wait_s(math.inf, 0.0, now_s) == 0.0


def test_a_report_is_the_same_until_it_is_heard_and_large_ones_are_cut() -> None:
    lines = tuple(Line("j", n, "/v1/x", msgspec.Raw(b"{}")) for n in range(4))
    chunk = HeldChunk(
        Chunk(chunk_id="c", fence=1, hold_s=10.0, due_in_s=99.0, lines=lines), "w", 0.0
    )
    held = list(chunk.lines.values())
    assert not chunk.due(2.9)
    assert chunk.due(3.1), "its hold is to be renewed"
    for each in held[:2]:
        body = msgspec.Raw(b'"' + b"x" * 9_000_000 + b'"')
        chunk.answer(each, Result(job_id="j", number=each.line.number, status=200, body=body))
    chunk.give_back(held[2])
    first = chunk.report()
    assert [r.number for r in first.results] == [0]
    assert (first.back, first.done) == ((), False)
    assert chunk.report() == first
    assert chunk.heard(first, Receipt(held=True, hold_s=10.0), 1.0)
    second = chunk.report()
    assert ([r.number for r in second.results], second.back) == ([1], (("j", 2),))
    assert chunk.heard(second, Receipt(held=True, dropped=("j",)), 2.0)
    assert held[3].gone
    assert chunk.report().done
    assert not chunk.over(11.9)
    assert chunk.over(12.1)
