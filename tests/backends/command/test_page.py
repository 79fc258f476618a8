"""The guide to the commands is what the commands say."""

from __future__ import annotations

from pathlib import Path

from backends.command_page import page

GUIDES = Path(__file__).parents[3] / "deploy" / "guides"


def test_the_guide_is_what_is_generated() -> None:
    assert (GUIDES / "commands.md").read_text() == page(), (
        "python -m backends.command_page > deploy/guides/commands.md"
    )


def test_the_picture_in_the_guide_is_there_and_small() -> None:
    assert "](images/top.png)" in (GUIDES / "top.md").read_text()
    assert 1_000 < (GUIDES / "images" / "top.png").stat().st_size < 120_000
