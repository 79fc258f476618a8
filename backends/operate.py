"""`doherty sleep`, `wake` and `snapshot create`: tell a manager, and wait until it is so or cannot
be.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from urllib.parse import quote

import msgspec

from backends.failure import StartError
from backends.ladder import Rung
from backends.lifecycle import Phase
from backends.snapshots.base import Progress
from backends.status import check_manager_url, no_manager, open_url

POLL_S = 0.1
TURN_S_MAX = 1200.0  # beyond a drain and the longest turn that a manager waits for


class _Seen(msgspec.Struct):
    """What the manager tells of a replica, as far as it matters here."""

    phase: Phase
    reason: str = ""
    image: Progress = Progress()


class _Refusal(msgspec.Struct):
    message: str


class _Refused(msgspec.Struct):
    error: _Refusal


def fall_asleep(
    manager_url: str, replica_id: str, level: int | None, rung: Rung = Rung.ASLEEP
) -> str:
    """Put a replica to sleep, or suspend it; return what came of it.

    Raises `StartError` when it would not.
    """
    url = _url(manager_url, replica_id)
    depth = f"level={level}&" if level else ""
    _post(manager_url, f"{url}/sleep?{depth}rung={rung}")
    seen = _after(manager_url, url, {Phase.EMPTYING, Phase.FALLING_ASLEEP})
    if seen.phase is (Phase.SUSPENDED if rung is Rung.SUSPENDED else Phase.ASLEEP):
        return f"{replica_id} is {seen.reason}"
    raise StartError(f"{replica_id} is {seen.phase.words}: {seen.reason}")


def wake(manager_url: str, replica_id: str) -> str:
    """Wake a replica; return what came of it. Raises `StartError` when it would not."""
    url = _url(manager_url, replica_id)
    _post(manager_url, f"{url}/wake")
    seen = _after(manager_url, url, {Phase.WAKING})
    if seen.phase in {Phase.READY, Phase.HELD}:
        return f"{replica_id} is {seen.reason or seen.phase.words}"
    raise StartError(f"{replica_id} is {seen.phase.words}: {seen.reason}")


def make_image(
    manager_url: str, replica_id: str, told: Callable[[str, float], None]
) -> tuple[Progress, str]:
    """Have an image made of a replica; return it, and what the manager says of it.

    `told` hears of progress. Raises `StartError` when none was made.
    """
    url = _url(manager_url, replica_id)
    _post(manager_url, f"{url}/snapshot")
    going = {Phase.EMPTYING, Phase.FALLING_ASLEEP}
    seen = _after(manager_url, url, going, lambda s: told(s.image.doing, s.image.share))
    if not seen.image.snapshot:
        problem = seen.image.problem or seen.reason
        raise StartError(f"{replica_id} is {seen.phase.words}, without an image: {problem}")
    return seen.image, f"{replica_id} is {seen.phase.words}: {seen.reason}"


def _url(manager_url: str, replica_id: str) -> str:
    check_manager_url(manager_url)
    return f"{manager_url.rstrip('/')}/v1/replicas/{quote(replica_id, safe='')}"


def _post(manager_url: str, url: str) -> None:
    ask(manager_url, urllib.request.Request(url, data=b"", method="POST"))  # noqa: S310  # checked


def _after(
    manager_url: str,
    url: str,
    phases: Collection[Phase],
    told: Callable[[_Seen], None] = lambda _seen: None,
) -> _Seen:
    """Return what is seen of a replica as soon as it is in none of `phases`."""
    give_up_s = time.monotonic() + TURN_S_MAX
    while True:
        body = ask(manager_url, urllib.request.Request(url))  # noqa: S310  # checked
        try:
            seen = msgspec.json.decode(body, type=_Seen)
        except msgspec.MsgspecError as error:
            raise StartError(f"{url} answered something else than a replica: {error}") from error
        if seen.phase not in phases:
            return seen
        told(seen)
        if time.monotonic() >= give_up_s:
            raise StartError(f"it is still {seen.phase.words}: {seen.reason}")
        time.sleep(POLL_S)


def ask(manager_url: str, request: urllib.request.Request) -> bytes:
    """Return what a manager answers. Raises `StartError` with its own words when it refuses."""
    try:
        with open_url(request) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        body = error.read()
        error.close()
        try:
            words = msgspec.json.decode(body, type=_Refused).error.message
        except msgspec.MsgspecError:
            words = f"{request.full_url} answered {error.code}: is that a manager?"
        raise StartError(words) from error
    except (OSError, ValueError) as error:
        raise no_manager(manager_url, error) from error
