"""What the sources of the page must not have: markup out of text, and the outside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "proxy" / "dashboard"
FILES = sorted(FOLDER.iterdir())
# By these, text becomes markup or code (OWASP's list of dangerous sinks).
SINKS = re.compile(
    r"\b(innerHTML|outerHTML|insertAdjacentHTML|setHTMLUnsafe|createContextualFragment|srcdoc"
    r"|document\.write|eval|DOMParser|importScripts)\b|new Function|javascript:"
)
LINES_MAX = 450


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_page_is_found() -> None:
    names = {path.name for path in FILES}
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= names
    assert {path.suffix for path in FILES} == {".html", ".css", ".js", ".svg"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_text_never_becomes_markup_and_nothing_is_from_outside(path: Path) -> None:
    text = _text(path)
    assert SINKS.search(text) is None
    outside = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+[^\"' )]*", text))
    assert outside <= {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert text.count("\n") <= LINES_MAX


def test_the_html_has_no_code_and_no_style_of_its_own() -> None:
    html = _text(FOLDER / "index.html")
    assert re.findall(r"<script(?![^>]* src=)[^>]*>|<style|\sstyle=|\son[a-z]+=", html) == []


def test_what_is_named_is_there() -> None:
    named = set(re.findall(r'(?:src|href)="([\w-]+\.\w+)"', _text(FOLDER / "index.html")))
    for path in FILES:
        if path.suffix == ".js":
            named |= set(re.findall(r'from "\./([\w.-]+)"', _text(path)))
    assert named == {path.name for path in FILES} - {"index.html"}
