"""Two letters say who ended a request, and how far it had come."""

from __future__ import annotations

import pytest

from proxy import errors
from proxy.core.retry import Progress
from proxy.core.termination import termination


@pytest.mark.parametrize(
    ("outcome", "progress", "letters"),
    [
        (errors.OK, Progress.RESPONSE_STARTED, "--"),
        (errors.CLIENT_GONE, Progress.QUEUED, "CQ"),
        (errors.CLIENT_GONE, Progress.CHOOSING, "CR"),
        (errors.CLIENT_GONE, Progress.RESPONSE_STARTED, "CD"),
        (errors.STREAM_CUT, Progress.RESPONSE_STARTED, "SD"),
        ("replica_unreachable", Progress.CONNECTING, "SC"),
        ("replica_lost", Progress.REQUEST_SENT, "SH"),
        ("replica_timeout", Progress.REQUEST_SENT, "sH"),
        ("queue_timeout", Progress.QUEUED, "sQ"),
        ("no_replica", Progress.CHOOSING, "SC"),
        ("request_timeout", Progress.CHOOSING, "cR"),
        ("queue_full", Progress.CHOOSING, "RR"),
        ("invalid_api_key", Progress.CHOOSING, "PR"),
        ("insufficient_quota", Progress.CHOOSING, "PR"),
        ("internal_error", Progress.CHOOSING, "IR"),
    ],
)
def test_the_letters(outcome: str, progress: Progress, letters: str) -> None:
    assert termination(outcome, progress, local=False) == letters


def test_what_the_proxy_answers_itself() -> None:
    assert termination(errors.OK, Progress.CHOOSING, local=True) == "L-"


def test_no_failure_of_a_replica_or_of_ours_passes_for_a_refusal() -> None:
    refusals = {
        each.code
        for each in errors.ALL_ERRORS
        if termination(each.code, Progress.QUEUED, local=False)[0] == "P"
    }
    told = {each.code: each.status for each in errors.ALL_ERRORS}
    wrong = {code for code in refusals if told[code] >= 500}
    assert wrong == {"http_version_not_supported", "not_implemented", "keys_not_known"}
    assert {"rate_limit_exceeded", "insufficient_quota", "invalid_json"} <= refusals
