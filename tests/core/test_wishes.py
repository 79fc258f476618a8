"""What a head says of its urgency: in whose words, and what of it goes on."""

from __future__ import annotations

import pytest

from proxy.core.classes import OFFLINE, ONLINE, SEMI_ONLINE, UNSAID
from proxy.core.preamble import read_preamble
from proxy.core.wishes import Wishes

_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: p"


def _wishes(*fields: str) -> Wishes:
    return read_preamble(b"\r\n".join((_HEAD, *(field.encode() for field in fields)))).wishes


@pytest.mark.parametrize("name", ["x-priority", "X-SMG-Priority"])
@pytest.mark.parametrize(
    ("word", "due"),
    [
        ("system", ONLINE),
        ("Interactive", ONLINE),
        ("default", UNSAID),
        ("BULK", OFFLINE),
        ("semi-online", SEMI_ONLINE),
        ("offline", OFFLINE),
        ("urgent", UNSAID),
        ("3", UNSAID),
        ("", UNSAID),
    ],
)
def test_a_priority_is_a_class_and_an_unknown_word_is_none(name: str, word: str, due: int) -> None:
    wishes = _wishes(f"{name}: {word}")
    assert (wishes.work_class, wishes.spare, wishes.error) == (due, False, None)


def test_our_own_field_outweighs_a_priority_unless_it_names_no_class() -> None:
    assert _wishes("x-priority: system", "x-doherty-class: offline").work_class == OFFLINE
    assert _wishes("x-doherty-class: none", "x-priority: bulk").work_class == OFFLINE
    assert _wishes("x-priority: bulk", "x-smg-priority: system").work_class == OFFLINE


@pytest.mark.parametrize(
    ("field", "ttft_s", "tpot_s"),
    [
        ("x-slo-ttft-ms: 250", 0.25, 0.0),
        ("X-LLM-D-SLO-TTFT-MS: 1500.5", 1.5005, 0.0),
        ("x-sgl-ttft-slo-ms: 40", 0.04, 0.0),
        ("x-slo-tpot-ms: 20", 0.0, 0.02),
        ("x-llm-d-slo-tpot-ms: 12.5", 0.0, 0.0125),
        ("x-sgl-tps-slo: 50", 0.0, 0.02),
        ("x-slo-ttft-ms: 0", 0.0, 0.0),
        ("x-sgl-tps-slo: 0", 0.0, 0.0),
    ],
)
def test_a_time_is_wanted_under_several_names(field: str, ttft_s: float, tpot_s: float) -> None:
    wishes = _wishes(field)
    assert (wishes.ttft_s, wishes.tpot_s, wishes.error) == (ttft_s, tpot_s, None)


def test_of_several_times_the_strictest_counts() -> None:
    fields = ("x-slo-ttft-ms: 900", "x-llm-d-slo-ttft-ms: 300", "x-slo-ttft-ms: 600")
    assert _wishes(*fields).ttft_s == 0.3
    assert _wishes("x-slo-tpot-ms: 50", "x-sgl-tps-slo: 100").tpot_s == 0.01


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-sgl-tps-slo"])
@pytest.mark.parametrize("value", ["soon", "-1", "1e3", "nan", "inf", "", "5 ms", "9" * 10, "0x10"])
def test_a_time_that_is_none_is_the_clients_error(name: str, value: str) -> None:
    error = _wishes(f"{name}: {value}").error
    assert error is not None
    assert (error.status, error.param) == (400, name)


@pytest.mark.parametrize(
    ("field", "patience_s"),
    [
        ("x-stainless-read-timeout: 12.5", 12.5),
        ("x-stainless-timeout: 30", 30.0),
        ("x-stainless-read-timeout: 600", 0.0),
        ("x-stainless-timeout: 3600", 0.0),
        ("x-stainless-read-timeout: None", 0.0),
        ("x-stainless-timeout: NOT_GIVEN", 0.0),
        ("x-stainless-timeout: 0", 0.0),
    ],
)
def test_a_library_says_how_long_it_listens_and_its_default_says_nothing(
    field: str, patience_s: float
) -> None:
    wishes = _wishes(field)
    assert (wishes.patience_s, wishes.error) == (patience_s, None)


def test_none_of_it_goes_on_but_what_a_library_writes() -> None:
    ours = ("x-priority: bulk", "x-smg-priority: bulk", "x-slo-ttft-ms: 1", "x-slo-tpot-ms: 1")
    theirs = ("x-llm-d-slo-ttft-ms: 1", "x-sgl-ttft-slo-ms: 1", "x-sgl-tps-slo: 1")
    lines = [line.encode() for line in (*ours, *theirs, "x-stainless-timeout: 5", "x-mine: 1")]
    sent = read_preamble(b"\r\n".join((_HEAD, *lines))).upstream_head(b"host: r\r\n", b"id", 2)
    for name in (b"priority", b"slo"):
        assert name not in sent
    assert b"x-stainless-timeout: 5\r\n" in sent
    assert b"x-mine: 1\r\n" in sent
