"""Retries: only while no replica can have begun the request, and within the budget."""

from __future__ import annotations

import pytest

from proxy.core.retry import Progress, may_retry


@pytest.mark.parametrize("progress", [Progress.CHOOSING, Progress.QUEUED, Progress.CONNECTING])
@pytest.mark.parametrize(
    ("attempts", "retries_max", "may"),
    [(1, 0, False), (1, 1, True), (2, 1, False), (3, 3, True), (4, 3, False)],
)
def test_before_the_request_is_sent(
    progress: Progress, attempts: int, retries_max: int, may: bool
) -> None:
    assert may_retry(progress, attempts, retries_max) is may


@pytest.mark.parametrize("progress", [Progress.REQUEST_SENT, Progress.RESPONSE_STARTED])
@pytest.mark.parametrize("retries_max", [0, 1, 1000])
def test_never_after(progress: Progress, retries_max: int) -> None:
    assert not may_retry(progress, 1, retries_max)


def test_progress_only_grows() -> None:
    assert sorted(Progress) == [
        Progress.CHOOSING,
        Progress.QUEUED,
        Progress.CONNECTING,
        Progress.REQUEST_SENT,
        Progress.RESPONSE_STARTED,
    ]
