"""The runbook has a section for each alert and each error, and none for what there is not."""

from __future__ import annotations

import re
from pathlib import Path

from proxy import errors
from tests.deploy.test_prometheus import alerts

_TEXT = (Path(__file__).parents[2] / "deploy" / "RUNBOOK.md").read_text(encoding="utf-8")


def _parts() -> dict[str, dict[str, str]]:
    """Return the text of each section, by chapter and by section."""
    found: dict[str, dict[str, str]] = {}
    for chapter in re.split(r"^## ", _TEXT, flags=re.MULTILINE)[1:]:
        title, _, body = chapter.partition("\n")
        sections = re.split(r"^### ", body, flags=re.MULTILINE)[1:]
        found[title] = {s.partition("\n")[0]: s.partition("\n")[2] for s in sections}
    return found


def test_every_alert_has_its_section_and_the_other_way_round() -> None:
    assert set(_parts()["Alerts"]) == {alert["alert"] for alert in alerts()}


def test_every_error_has_its_section_and_the_other_way_round() -> None:
    assert set(_parts()["Error codes"]) == {kind.code for kind in errors.ALL_ERRORS}
    told = {errors.CLIENT_GONE, errors.STREAM_CUT}
    assert set(_parts()["Outcomes that no answer tells"]) == told


def test_every_error_stands_under_its_status_and_says_whether_to_repeat() -> None:
    sections = _parts()["Error codes"]
    for kind in errors.ALL_ERRORS:
        text = sections[kind.code].strip()
        assert text.startswith(str(kind.status)), kind.code
        if kind.status >= 429 and kind.status not in (431, 501, 505):  # those are the client's
            assert ("not to be repeated" in text) != kind.should_retry, kind.code


def test_every_section_says_what_it_means_and_what_to_do() -> None:
    chapters = _parts()
    for title in ("Alerts", "Error codes", "Outcomes that no answer tells"):
        for name, text in chapters[title].items():
            assert "**Means.**" in text, name
            assert re.search(r"\*\*(Look, do|Do)\.\*\*", text), name
    for name, text in chapters["Alerts"].items():
        assert re.search(r"\*\*Look(, do)?\.\*\*", text), name


def test_what_a_bad_night_needs_is_there() -> None:
    wanted = {"Upgrade", "Drain a replica", "Rotate keys", "A region is lost"}
    wanted |= {"The disk is full", "A GPU is lost"}
    assert wanted <= set(_parts()["What operators do"])
    assert "The first five minutes" in _parts()
