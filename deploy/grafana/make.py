"""Makes the dashboards for Grafana: its JSON, out of what each has on it.

    python deploy/grafana/make.py          writes deploy/grafana/dashboards/*.json

What is on a dashboard stands in boards/*.yaml, title and queries of each panel; here is how a
panel, a variable and a page look to Grafana, after its dashboard JSON model (schema version 39,
which newer releases migrate). Panels are placed in rows from left to right on its grid of 24
columns, so that none can overlap. Tests hold the files to what this writes, every field to types of
Grafana, and every query to a Prometheus that scrapes a real `doherty up`.

A panel is a time series unless its `kind` says otherwise. `queries` are by legend. `bounds`: where
a figure turns orange and red; with `falling`, below which it is red.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "dashboards"
SIZES = {"stat": (4, 4)}  # width and height by kind; the others':
SIZE = (8, 8)
SCHEMA_VERSION = 39
COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One panel."""

    title: str
    queries: dict[str, str]  # PromQL by its legend; `value`: no legend
    kind: str = "timeseries"
    unit: str = "short"  # as Grafana calls them
    about: str = ""
    width: int | None = None
    stacked: bool = False
    range: tuple[float, float] | None = None
    bounds: tuple[float, ...] = ()
    falling: bool = False

    @property
    def size(self) -> tuple[int, int]:
        width, height = SIZES.get(self.kind, SIZE)
        return self.width or width, height


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Panels under one title."""

    row: str
    panels: tuple[Panel, ...]


class Board(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One dashboard."""

    title: str
    about: str
    rows: tuple[Row, ...]
    variables: dict[str, str] = {}


def boards() -> dict[str, Board]:
    """Return all dashboards, by the name of their file."""
    paths = sorted((HERE / "boards").glob("*.yaml"))
    return {path.stem: msgspec.yaml.decode(path.read_bytes(), type=Board) for path in paths}


def made() -> dict[str, str]:
    """Return the text of each file, by name."""
    return {
        f"{name}.json": json.dumps(_board(name, board), indent=1, ensure_ascii=False) + "\n"
        for name, board in boards().items()
    }


def _board(name: str, board: Board) -> dict[str, Any]:
    return {
        "uid": f"doherty-{name}",
        "title": f"Doherty: {board.title}",
        "description": board.about,
        "tags": ["doherty"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "id": None,
        "editable": True,
        "graphTooltip": 1,  # one crosshair over all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "fiscalYearStartMonth": 0,
        "annotations": {"list": [_alerts()]},
        "links": [_siblings()],
        "templating": {"list": [_source_variable(), *map(_variable, board.variables.items())]},
        "panels": list(_panels(board)),
    }


def _siblings() -> dict[str, Any]:
    """Links to the other dashboards of the same tag, with the time and the variables kept."""
    return {
        "type": "dashboards",
        "tags": ["doherty"],
        "title": "Doherty",
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
        "icon": "external link",
        "targetBlank": False,
        "tooltip": "",
        "url": "",
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "datasource": _SOURCE,
        "expr": 'ALERTS{alertname=~"Doherty.*",alertstate="firing",severity="critical"}',
        "titleFormat": "{{alertname}}",
        "step": "60s",
    }


def _source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
        "regex": "",
        "options": [],
        "current": {},
    }


def _variable(pair: tuple[str, str]) -> dict[str, Any]:
    """A choice of the values of a label; all of them at first, and `.*` for all."""
    name, query = pair
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "variable"},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "hide": 0,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "regex": "",
        "options": [],
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _panels(board: Board) -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for row in board.rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.row,
            "collapsed": False,
            "panels": [],
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
        }
        y += 1
        x, height = 0, 0
        for panel in row.panels:
            wide, high = panel.size
            if x + wide > COLUMNS:
                x, y, height = 0, y + height, 0
            number += 1
            place = {"h": high, "w": wide, "x": x, "y": y}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            x, height = x + wide, max(height, high)
        y += height


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": list(_targets(panel)),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        **({"transformations": _TABLE} if panel.kind == "table" else {}),
    }


def _targets(panel: Panel) -> Iterator[dict[str, Any]]:
    instant = panel.kind in ("stat", "table")
    for letter, (legend, expr) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        yield {
            "refId": letter,
            "datasource": _SOURCE,
            "expr": expr,
            "legendFormat": "__auto" if legend == "value" else legend,
            "editorMode": "code",
            "range": not instant,
            "instant": instant,
            "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
        }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    for colour, value in zip(("orange", "red"), panel.bounds, strict=False):
        steps.append({"color": colour, "value": value})
    if panel.falling:  # less is worse: the first bound is where it turns good
        steps = [
            {"color": "red", "value": None},
            *({"color": "green", "value": value} for value in panel.bounds[:1]),
        ]
    found: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "noValue": "-",
    }
    if panel.range is not None:
        found["min"], found["max"] = panel.range
    if panel.kind == "timeseries":
        found["color"] = {"mode": "palette-classic"}
        found["custom"] = _lines(stacked=panel.stacked)
    elif panel.kind == "stat":
        found["color"] = {"mode": "thresholds"}
    return found


def _lines(*, stacked: bool) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "axisSoftMin": 0,
        "thresholdsStyle": {"mode": "off"},
    }


_LEGEND = {
    "displayMode": "table",
    "placement": "bottom",
    "showLegend": True,
    "calcs": ["lastNotNull", "max"],
}
_REDUCED = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {
        "reduceOptions": _REDUCED,
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "textMode": "auto",
        "orientation": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm", "footer": {"show": False}},
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "cellGap": 1,
        "yAxis": {"unit": "s", "axisPlacement": "left"},
        "tooltip": {"show": True, "yHistogram": False},
        "legend": {"show": True},
    },
}
# What Prometheus adds to every row and no reader wants.
_TABLE = [
    {
        "id": "organize",
        "options": {
            "excludeByName": {"Time": True, "__name__": True, "job": True},
            "indexByName": {},
        },
    }
]


def main(argv: Sequence[str]) -> int:
    if argv:
        sys.stderr.write(f"{__doc__}")
        return 2
    FOLDER.mkdir(exist_ok=True)
    texts = made()
    for stale in {path.name for path in FOLDER.glob("*.json")} - texts.keys():
        (FOLDER / stale).unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
