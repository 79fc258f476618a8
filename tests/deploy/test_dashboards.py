"""The dashboards: what their script makes of them, and what Grafana wants of a dashboard."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.deploy.test_metrics_guide import load
from tests.deploy.test_prometheus import promtool

_FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
_KINDS = {"timeseries", "stat", "table", "heatmap", "row"}
# Of Grafana's list of units (packages/grafana-data, valueFormats/categories).
_UNITS = {"short", "s", "bytes", "percentunit", "reqps", "cps", "dateTimeFromNow"}
_BUILT_IN = {"__rate_interval"}


def dashboards() -> dict[str, dict[str, Any]]:
    paths = sorted((_FOLDER / "dashboards").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def _panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(window: str) -> Iterator[tuple[str, str, str]]:
    """Yield title, legend and query of each panel, with all values chosen of every variable."""
    for board in dashboards().values():
        for panel in _panels(board):
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", window)
                yield panel["title"], target["legendFormat"], re.sub(r"\$\w+", ".*", expr)


@pytest.fixture(scope="module")
def make() -> ModuleType:
    return load(_FOLDER / "make.py")


def test_the_files_are_what_the_script_makes(make: ModuleType) -> None:
    made = make.made()
    there = {path.name: path.read_text() for path in (_FOLDER / "dashboards").iterdir()}
    assert there == made, "python deploy/grafana/make.py writes them anew"
    assert len(made) == 7


def test_a_misspelt_panel_is_refused(make: ModuleType) -> None:
    with pytest.raises(Exception, match="widht"):
        make.msgspec.convert({"title": "t", "queries": {}, "widht": 3}, make.Panel)


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_each_is_a_whole_dashboard(name: str) -> None:
    board = dashboards()[name]
    assert board["uid"] == f"doherty-{name}"
    assert len(board["uid"]) <= 40  # Grafana's limit
    assert board["schemaVersion"] == 39
    assert board["title"].startswith("Doherty: ")
    assert board["id"] is None  # or an import would overwrite another's
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        assert panel["type"] in _KINDS
        assert panel["title"]
    for panel in _panels(board):
        assert 1 <= len(panel["targets"]) <= 8
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        assert panel["fieldConfig"]["defaults"]["unit"] in _UNITS
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


# What Grafana reads though its model of a dashboard does not name it: fields that an annotation has
# by its Prometheus source, a variable's query as its editor shows it, an id that is not given yet.
_BESIDES_THE_MODEL = {
    "id",
    "annotations.list.step",
    "annotations.list.titleFormat",
    "templating.list.definition",
}


def _lost(ours: object, theirs: object, path: str) -> Iterator[str]:
    """Yield where `theirs`, which came of `ours`, is something else."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            inner = f"{path}.{key}".strip(".")
            if key in theirs:
                yield from _lost(value, theirs[key], inner)
            else:
                yield inner
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs, strict=True):
            yield from _lost(one, other, path)
    elif ours != theirs:
        yield path


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_grafanas_own_model_knows_every_field_and_value(name: str) -> None:
    """Read into Grafana's types and written again: what they do not know would be gone."""
    plugins.register_default_plugins()
    board = dashboards()[name]
    read = Dashboard.from_json(board)
    written = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert set(_lost(board, written, "")) <= _BESIDES_THE_MODEL
    assert set(_lost({**board, "refersh": "1s"}, written, "")) - _BESIDES_THE_MODEL == {"refersh"}


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_no_panel_lies_over_another_or_beside_the_grid(name: str) -> None:
    places = [panel["gridPos"] for panel in dashboards()[name]["panels"]]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_every_variable_is_declared_and_used(name: str) -> None:
    board = dashboards()[name]
    declared = {each["name"] for each in board["templating"]["list"]} - {"datasource"}
    used = set(
        re.findall(r"\$(\w+)", " ".join(t["expr"] for p in _panels(board) for t in p["targets"]))
    )
    assert used - _BUILT_IN == declared


def test_legends_name_labels_that_the_query_keeps() -> None:
    for title, legend, expr in queries("1m"):
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expr))))
        named = set(re.findall(r"{{(\w+)}}", legend))
        assert not kept or named <= kept, (title, expr)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian's prometheus)")
def test_every_query_is_one(tmp_path: Path) -> None:
    """Also those for which a small deployment has no data: promtool reads them as rules."""
    rules = [
        {"record": f"panel:q{number}:x", "expr": expr}
        for number, (_, _, expr) in enumerate(queries("1m"))
    ]
    page = tmp_path / "queries.yaml"
    page.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    run = promtool("check", "rules", str(page))
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(rules)} rules found" in run.stdout


def test_grafana_is_told_where_dashboards_and_prometheus_are() -> None:
    folder = _FOLDER / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (provider,) = yaml.safe_load((folder / "dashboards/doherty.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"].endswith("/dashboards")
