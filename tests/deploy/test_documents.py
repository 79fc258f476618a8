"""What the documents say: links lead somewhere, configurations are valid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from proxy.config import parse_config
from proxy.config_schema import json_schema

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("deploy/**/*.md"), *ROOT.glob("loadtest/**/*.md")]
)
VALIDATOR = jsonschema.Draft202012Validator(json_schema())
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchors(path: Path) -> set[str]:
    """Those that GitHub gives to headings: lower case, without marks, hyphens for blanks."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        anchors.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return anchors


def _links(path: Path) -> Iterator[str]:
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def _where_it_breaks(path: Path, target: str) -> str:
    """Why a link leads nowhere; empty if it does lead somewhere."""
    file, _, anchor = target.partition("#")
    goal = (path.parent / file).resolve() if file else path
    if not goal.exists():
        return f"{target}: no such file"
    if anchor and anchor not in _anchors(goal):
        return f"{target}: no such heading"
    return ""


def test_the_documents_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "deploy/guides/engines.md"} <= set(
        map(_name, DOCUMENTS)
    )
    assert _links(ROOT / "README.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert [broken for target in _links(path) if (broken := _where_it_breaks(path, target))] == []


def test_the_readme_takes_five_minutes_and_leads_to_every_guide() -> None:
    readme = ROOT / "README.md"
    assert readme.read_text(encoding="utf-8").count("\n") <= 330
    reached, left = {readme}, [readme]
    while left:
        path = left.pop()
        targets = {(path.parent / target.partition("#")[0]).resolve() for target in _links(path)}
        found = {target for target in targets if target.suffix == ".md"} - reached
        reached |= found
        left += [path for path in found if path.exists()]
    assert set(DOCUMENTS) - reached == set()


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/guides/*.md")), ids=_name)
def test_a_guide_begins_with_what_it_is_for(path: Path) -> None:
    heading, blank, first, *_ = path.read_text(encoding="utf-8").split("\n")
    assert heading.startswith("# ")
    assert not blank
    assert re.match(r"[^|#>!`\s-]", first), "a sentence that says what the guide is for comes first"


def test_a_link_that_leads_nowhere_is_noticed() -> None:
    readme = ROOT / "README.md"
    assert _where_it_breaks(readme, "deploy/guides/no-such.md")
    assert _where_it_breaks(readme, "#no-such-heading")
    assert not _where_it_breaks(readme, "#run-it")


# Keys at the top of files that are other programs': Compose, Kubernetes, Prometheus, Alertmanager.
_FOREIGN = re.compile(
    r"^(services|apiVersion|scrape_configs|global|groups|receivers|route|rule_files):", re.MULTILINE
)
_YAML = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _configurations() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for number, text in enumerate(_YAML.findall(path.read_text(encoding="utf-8")), 1):
            if not _FOREIGN.search(text):
                found.append((f"{_name(path)} ({number})", text))
    return found


@pytest.mark.parametrize(("name", "text"), _configurations(), ids=lambda value: value[:40])
def test_every_configuration_is_valid(name: str, text: str) -> None:
    parse_config(text, name)
    VALIDATOR.validate(yaml.safe_load(text))
