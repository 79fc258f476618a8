"""Files and batches as the OpenAI API shows them, made of what the store tells.

What OpenAI does not have stands in one field of its own, `doherty`, so that clients which check
what they get against the published shape find nothing out of place in the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from backends.offline.records import ENDED, IN_PROGRESS, FileRecord, JobRecord

WINDOW_S_MIN, WINDOW_S_MAX = 1, 30 * 86400
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"(\d{1,8})([smhd])")


def window_of(text: str) -> int | None:
    """Return the seconds of a completion window such as 24h; None where it is none."""
    match = _WINDOW.fullmatch(text)
    if match is None:
        return None
    window_s = int(match[1]) * _UNITS_S[match[2]]
    return window_s if WINDOW_S_MIN <= window_s <= WINDOW_S_MAX else None


def window_text(window_s: float) -> str:
    """Write a window as OpenAI does: in hours, where it is some."""
    whole_s = int(window_s)
    unit = next(unit for unit in ("h", "m", "s") if whole_s % _UNITS_S[unit] == 0)
    return f"{whole_s // _UNITS_S[unit]}{unit}"


def file_object(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_s),
        "expires_at": _at(record.expires_s),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed" if record.ready else "uploaded",
        "status_details": None,
    }


def batch_object(
    job: JobRecord,
    tokens_per_s: float,
    cost: float | None,
    *,
    moved_up: bool,
    problem: str | None,
) -> dict[str, Any]:
    """Return a batch; `tokens_per_s` is what was done of it lately, `cost` what that has cost.

    `moved_up`: its model's lines go as semi-online work now, because some would be late else.
    `problem`: why nobody does its lines, in words.
    """
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.endpoint,
        "model": job.model or None,
        "errors": _errors(job),
        "input_file_id": job.input_file_id,
        "completion_window": window_text(job.window_s),
        "status": job.state,
        "output_file_id": job.output_file_id,
        "error_file_id": job.error_file_id,
        "created_at": int(job.created_s),
        "in_progress_at": _at(job.in_progress_s),
        "expires_at": int(job.expires_s),
        "finalizing_at": _at(job.finalizing_s),
        "completed_at": _at(job.completed_s),
        "failed_at": _at(job.failed_s),
        "expired_at": _at(job.expired_s),
        "cancelling_at": _at(job.cancelling_s),
        "cancelled_at": _at(job.cancelled_s),
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": _usage(job),
        "metadata": job.metadata or None,
        "doherty": {
            "tokens": job.prompt_tokens + job.completion_tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "eta_s": _eta_s(job, tokens_per_s),
            "gpu_s": round(job.busy_s, 3),
            "cost": None if cost is None else round(cost, 6),
            "moved_up": moved_up and job.state == IN_PROGRESS,
            "problem": problem,
        },
    }


def page_object(items: Sequence[Mapping[str, Any]], *, more: bool) -> dict[str, Any]:
    """Return one page of a list."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": more,
    }


def _errors(job: JobRecord) -> dict[str, Any] | None:
    if not job.errors:
        return None
    data = [
        {"code": e.code, "line": e.line, "message": e.message, "param": e.param} for e in job.errors
    ]
    return {"object": "list", "data": data}


def _usage(job: JobRecord) -> dict[str, Any] | None:
    if job.in_progress_s is None:
        return None
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": job.cached_tokens},
        "output_tokens": job.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + job.completion_tokens,
    }


def _eta_s(job: JobRecord, tokens_per_s: float) -> float | None:
    """Say when it will be done at the speed of the last minute, if it gets on at all.

    What is left is counted in lines of the mean size of those that were done: what a line takes was
    only a guess before.
    """
    if job.state in ENDED:
        return 0.0
    done = job.completed + job.failed
    if not done or tokens_per_s <= 0:
        return None
    tokens_per_line = (job.prompt_tokens + job.completion_tokens) / done
    return round((job.total - done) * tokens_per_line / tokens_per_s, 1)


def _at(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)
