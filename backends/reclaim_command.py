"""`doherty reclaim`: tell a manager that its machine, or GPUs of it, will be taken away."""

from __future__ import annotations

import urllib.request
from urllib.parse import urlencode

import msgspec

from backends.failure import StartError
from backends.notices import ReclaimReport
from backends.operate import ask
from backends.reclaim_api import RECLAIM_PATH
from backends.status import check_manager_url


def reclaim(
    manager_url: str, in_s: float | None, gpus: str | None = None, *, cancel: bool = False
) -> str:
    """Give notice, or cancel all, or neither; return what is so then. Raises `StartError`."""
    check_manager_url(manager_url)
    url, method = manager_url.rstrip("/") + RECLAIM_PATH, "GET"
    if cancel:
        method = "DELETE"
    elif in_s is not None:
        what = {"in_s": f"{in_s:g}"} | ({} if gpus is None else {"gpus": gpus})
        url, method = f"{url}?{urlencode(what)}", "POST"
    data = b"" if method == "POST" else None
    body = ask(manager_url, urllib.request.Request(url, data=data, method=method))  # noqa: S310
    try:
        return story(msgspec.json.decode(body, type=ReclaimReport))
    except msgspec.MsgspecError as error:
        raise StartError(f"{url} answered something else than notices: {error}") from error


def story(report: ReclaimReport) -> str:
    """Put notices, and what becomes of whom, into lines."""
    lines = []
    for notice in report.notices:
        what = "the machine" if notice.gpus is None else "GPU " + ", ".join(notice.gpus)
        left = f"in {notice.ends_in_s:.0f} s" if notice.ends_in_s > 0 else "by now"
        lines.append(f"{what} will be gone {left}")
    for name, fate in report.fates.items():
        stand_in = report.stand_ins.get(name)
        lines.append(f"  {name} {fate}" + (f"; {stand_in} stands in for it" if stand_in else ""))
    return "\n".join(lines) or "nothing is to be taken away"
