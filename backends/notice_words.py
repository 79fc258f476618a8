"""What clouds say before they take a machine away, and how it is asked for.

- AWS: `latest/meta-data/spot/instance-action` is not found until two minutes before the end, then
  an action with its time. (EC2 user guide, "Spot Instance interruption notices".) Many machines are
  set up so that it wants the token of IMDSv2.
- Google: `instance/preempted` turns TRUE, and 30 s remain. (Compute Engine, "Spot VMs".)
- Azure: `scheduledevents` lists events; one of type Preempt or Terminate names the machine among
  its resources and has the time before which nothing happens, empty once it is under way.
  (Azure, "Scheduled Events for Linux VMs".) A Preempt is told 30 s before.
- A file: it appears. It may hold `{"in_s": 30, "gpus": ["0"]}`; both may be left out.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

from proxy.config import ReclaimNoticeConfig

SHORTEST_S = 30.0  # Google's and Azure's notice, and what is taken where none is said
_LINK_LOCAL = "http://169.254.169.254"


class Ask(msgspec.Struct, frozen=True):
    """How a cloud is asked. `name_url` answers with this machine's name where that is needed."""

    url: str
    headers: dict[str, str] = {}
    token_url: str = ""
    name_url: str = ""


class Told(msgspec.Struct, frozen=True):
    """What goes, and when, in Unix time; no cards: the whole machine."""

    ends_unix_s: float
    gpus: tuple[str, ...] = ()


class _Action(msgspec.Struct):
    action: str
    time: datetime


class _Event(msgspec.Struct, rename="pascal"):
    event_type: str = ""
    not_before: str = ""
    resources: list[str] = []


class _Events(msgspec.Struct, rename="pascal"):
    events: list[_Event] = []


class _File(msgspec.Struct):
    in_s: float = SHORTEST_S
    gpus: list[str] = []


_ASKS = {
    "aws": Ask(
        f"{_LINK_LOCAL}/latest/meta-data/spot/instance-action",
        token_url=f"{_LINK_LOCAL}/latest/api/token",
    ),
    "gcp": Ask(
        "http://metadata.google.internal/computeMetadata/v1/instance/preempted",
        {"Metadata-Flavor": "Google"},
    ),
    "azure": Ask(
        f"{_LINK_LOCAL}/metadata/scheduledevents?api-version=2020-07-01",
        {"Metadata": "true"},
        name_url=f"{_LINK_LOCAL}/metadata/instance/compute/name?api-version=2021-02-01&format=text",
    ),
    "file": Ask(""),
}


def ask_of(config: ReclaimNoticeConfig) -> Ask:
    """Return how the notice of `config` is asked for; of a file the path is the URL."""
    ask = _ASKS[config.kind]
    return msgspec.structs.replace(ask, url=config.source) if config.source else ask


def read_notice(kind: str, body: bytes, name: str, now_unix_s: float) -> Told | None:
    """Return what an answer (of status 200) or a file says; None: nothing is taken away.

    `name` is this machine's, where that is known. Raises `ValueError` on what cannot be understood.
    """
    match kind:
        case "aws":
            action = msgspec.json.decode(body, type=_Action)
            return Told(action.time.replace(tzinfo=action.time.tzinfo or UTC).timestamp())
        case "gcp":
            gone = body.strip().upper() == b"TRUE"
            return Told(now_unix_s + SHORTEST_S) if gone else None
        case "azure":
            return _azure(msgspec.json.decode(body, type=_Events).events, name, now_unix_s)
        case _:
            told = msgspec.json.decode(body, type=_File) if body.strip() else _File()
            return Told(now_unix_s + told.in_s, tuple(told.gpus))


def _azure(events: list[_Event], name: str, now_unix_s: float) -> Told | None:
    ends = [
        parsedate_to_datetime(event.not_before).timestamp() if event.not_before else now_unix_s
        for event in events
        if event.event_type in {"Preempt", "Terminate"}
        and (not name or name in event.resources or not event.resources)
    ]
    return Told(min(ends)) if ends else None
