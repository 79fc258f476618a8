"""What clouds say before they take a machine away."""

from __future__ import annotations

import pytest

from backends.notice_words import SHORTEST_S, Told, ask_of, read_notice
from proxy.config import ReclaimNoticeConfig

NOW_S = 1_790_000_000.0
AZURE = b"""{"DocumentIncarnation": 3, "Events": [
  {"EventId": "A", "EventType": "Freeze", "Resources": ["vm"], "NotBefore": ""},
  {"EventId": "B", "EventType": "Preempt", "ResourceType": "VirtualMachine",
   "Resources": ["vm"], "NotBefore": "Mon, 21 Sep 2026 14:13:50 GMT"}]}"""
STARTED = b'{"Events": [{"EventType": "Terminate", "Resources": ["vm"], "NotBefore": ""}]}'


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("aws", b'{"action": "terminate", "time": "2026-09-21T14:13:20Z"}', Told(NOW_S)),
        ("aws", b'{"action": "stop", "time": "2026-09-21T14:13:20"}', Told(NOW_S)),
        ("gcp", b"FALSE", None),
        ("gcp", b"TRUE\n", Told(NOW_S + SHORTEST_S)),
        ("azure", b'{"DocumentIncarnation": 1, "Events": []}', None),
        ("azure", AZURE, Told(NOW_S + 30.0)),
        ("azure", AZURE.replace(b'"vm"', b'"other"'), None),
        ("azure", STARTED, Told(NOW_S)),
        ("file", b"", Told(NOW_S + SHORTEST_S)),
        ("file", b'{"in_s": 5}', Told(NOW_S + 5.0)),
        ("file", b'{"gpus": ["0", "1"]}', Told(NOW_S + SHORTEST_S, ("0", "1"))),
    ],
)
def test_what_is_said_is_understood(kind: str, body: bytes, told: Told | None) -> None:
    assert read_notice(kind, body, "vm", NOW_S) == told


def test_a_machine_that_does_not_know_its_name_takes_every_notice_for_its_own() -> None:
    assert read_notice("azure", AZURE, "", NOW_S) == Told(NOW_S + 30.0)


@pytest.mark.parametrize(
    ("kind", "body"),
    [("aws", b"<html>"), ("aws", b"{}"), ("azure", b"[]"), ("file", b"soon")],
)
def test_what_is_no_notice_is_an_error(kind: str, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_notice(kind, body, "vm", NOW_S)


def test_each_cloud_is_asked_where_it_answers_unless_another_place_is_named() -> None:
    urls = {kind: ask_of(ReclaimNoticeConfig(kind=kind)).url for kind in ("aws", "gcp", "azure")}
    assert all(url.startswith("http://") for url in urls.values())
    assert len(set(urls.values())) == 3
    named = ReclaimNoticeConfig(kind="gcp", source="http://127.0.0.1/x")
    assert ask_of(named).url == "http://127.0.0.1/x"
    assert ask_of(named).headers == {"Metadata-Flavor": "Google"}
    assert ask_of(ReclaimNoticeConfig(kind="file", source="/run/notice")).url == "/run/notice"
