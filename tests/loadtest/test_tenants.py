"""The labs of tenants and deadlines: who sends what, and how it is judged."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from loadtest.fleet import Ports
from loadtest.tenants import deadlines, fairness
from loadtest.tenants.stage import Setting, configuration, key_of
from loadtest.tenants.traffic import Record, Sender, request_body

PORTS = Ports(proxy=1, admin=2, manager=3)
OPTIONS = fairness.Options(warm=5.0, load=0.5, times=10.0, prompts=(900,), output_tokens=100)


def test_the_configuration_has_a_key_for_each_tenant_that_only_its_owner_can_read(
    tmp_path: Path,
) -> None:
    made = configuration(Setting(), {"a": 1.0, "b": 3.0}, PORTS, str(tmp_path / "run"))
    assert [tenant["weight"] for tenant in made["tenants"]] == [1.0, 3.0]
    path = Path(made["proxy"]["keys_path"])
    assert path.stat().st_mode & 0o077 == 0
    text = path.read_text()
    assert key_of("a") not in text
    assert [key["tenant"] for key in orjson.loads(text)["keys"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("cell", "rates"),
    [
        ("alone", {"other": 2.5}),
        ("at share", {"other": 2.5, "flooder": 2.5}),
        ("flood", {"other": 2.5, "flooder": 50.0}),
        ("1:3", {"flooder": 50.0, "triple": 50.0}),
        ("online", {"other": 9.5}),
        ("with offline", {"other": 9.5, "offline": 50.0}),
    ],
)
def test_who_sends_how_much(cell: str, rates: dict[str, float]) -> None:
    senders = fairness.senders_of(cell, 10_000.0, OPTIONS)
    assert {each.name: pytest.approx(each.rate) for each in senders} == rates


def test_without_tenants_all_have_one_key() -> None:
    assert len({each.key for each in fairness.senders_of("as one", 1e4, OPTIONS)}) == 1
    assert len({each.key for each in fairness.senders_of("flood", 1e4, OPTIONS)}) == 2


def _record(due_s: float, first_s: float, ended_s: float, fate: str = "complete") -> Record:
    tokens = 1000 if fate == "complete" else 0
    return Record("other", due_s, first_s, ended_s, tokens, 900, fate)


def test_one_that_got_nothing_has_waited_until_the_end() -> None:
    records = [
        _record(1.0, 1.1, 2.0),  # while it warms up
        _record(6.0, 6.2, 7.0),
        _record(10.0, 0.0, 0.0, "open"),
        _record(11.0, 0.0, 11.1, "failed: status 429"),
    ]
    cell = fairness.look("flood", "other", (records, 0.0, 25.0), OPTIONS)
    assert (cell.requests, cell.complete, cell.refused) == (3, 1, 1)
    assert cell.ttft_max_s == 15.0
    assert cell.tokens_per_s == 1000 / 20.0


def _cell(cell: str, sender: str, tokens: float = 0.0, p99_s: float = 0.0) -> fairness.Cell:
    return fairness.Cell(
        cell=cell,
        sender=sender,
        requests=1,
        complete=1,
        refused=0,
        tokens_per_s=tokens,
        ttft_p50_s=0.0,
        ttft_p99_s=p99_s,
        ttft_max_s=0.0,
    )


@pytest.mark.parametrize(
    ("triple", "p99_s", "kept"), [(2.9, 1.1, True), (2.0, 1.1, False), (3.0, 1.3, False)]
)
def test_promises_are_held_against_the_figures(triple: float, p99_s: float, kept: bool) -> None:
    cells = [
        _cell("at share", "other", p99_s=1.0),
        _cell("flood", "other", p99_s=p99_s),
        _cell("1:3", "flooder", tokens=1.0),
        _cell("1:3", "triple", tokens=triple),
    ]
    assert fairness.judge(cells).kept is kept


def test_prompts_share_no_beginning_and_ask_for_their_usage() -> None:
    sender = Sender(name="a", key="k", rate=1.0, prompts=(100,), output_tokens=5, tier="flex")
    one, other = (orjson.loads(request_body(sender, 100, name)) for name in ("x 1", "y 1"))
    assert one["stream_options"] == {"include_usage": True}
    assert (one["service_tier"], one["max_tokens"]) == ("flex", 5)
    texts = [each["messages"][0]["content"] for each in (one, other)]
    assert texts[0][0] != texts[1][0]
    assert [len(text) for text in texts] == [400, 400]


def test_deadlines_count_those_who_were_answered_in_time() -> None:
    options = deadlines.Options(deadline_ms=500)
    records = [
        Record("online", 6.0, 6.4, 8.0, 10, 900, "complete"),
        Record("online", 6.0, 6.9, 8.0, 10, 900, "complete"),
        Record("online", 7.0, 0.0, 7.5, 0, 900, "failed: status 504"),
        Record("offline", 6.0, 6.5, 8.0, 400, 900, "complete"),
    ]
    cell = deadlines.look("mixed", (records, 0.0, 25.0), options, (1, 1, 1))
    assert (cell.online, cell.answered, cell.in_time, cell.shed) == (3, 2, 1, 1)
    assert cell.offline_tokens_per_s == 20.0
    kept, (line,) = deadlines.judge([cell])
    assert not kept
    assert "33.3% of online requests in time, 50.0% of those answered" in line
    assert "1/1/1" in deadlines.table([cell], options)


def test_the_control_says_no_deadlines() -> None:
    options = deadlines.Options(overload=1.3, online=0.8)
    for cell in deadlines.CELLS:
        senders = deadlines.senders_of(cell, 10.0, options)
        assert sum(each.rate for each in senders) == pytest.approx(13.0)
        by_ms = {each.deadline_ms for each in senders if each.name == "online"}
        assert by_ms == ({0} if cell.endswith("none said") else {1000})
