"""The guide to the metrics, and what stands on dashboards and in rules, against what is served."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from backends.metric_lists import (
    ENGINE_WORKER,
    ENGINE_WORKER_PREFIX,
    MANAGER,
    MANAGER_PREFIX,
    OFFLINE,
    OFFLINE_PREFIX,
)
from proxy.contract.metrics import METRICS_VERSION, PREFIX, Family, table
from proxy.core import claim_limits, limits
from proxy.io.families import FAMILIES

ROOT = Path(__file__).parents[2]
LISTS = (
    (PREFIX, FAMILIES),
    (MANAGER_PREFIX, MANAGER),
    (OFFLINE_PREFIX, OFFLINE),
    (ENGINE_WORKER_PREFIX, ENGINE_WORKER),
)


def load(path: Path) -> ModuleType:
    """Import a script of deploy/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def everything() -> dict[str, Family]:
    """Return all families of all services, by their whole names."""
    return {
        prefix + name: family for prefix, families in LISTS for name, family in families.items()
    }


def test_no_two_services_have_a_name_in_common() -> None:
    assert len(everything()) == sum(len(families) for _, families in LISTS)


def test_names_say_what_they_count() -> None:
    """What promtool would say, and the guide of Prometheus, without promtool."""
    for name, family in everything().items():
        assert (family.kind == "counter") == name.endswith("_total"), name
        assert (family.kind == "histogram") == bool(family.edges), name
        assert not family.text.endswith("."), name
        assert not {"le", "quantile", "instance", "job"} & set(family.labels), name
        assert not name.endswith(("_ms", "_milliseconds", "_percent")), name
        assert list(family.edges) == sorted(set(family.edges)), name


def test_one_name_is_declared_once() -> None:
    once = Family("a_total", "counter", "A")
    with pytest.raises(AssertionError):
        table(once, once)


def test_the_guide_has_every_metric_as_it_is_served() -> None:
    guide = load(ROOT / "deploy" / "prometheus" / "guide.py")
    above, _, below = guide.GUIDE.read_text(encoding="utf-8").partition(guide.MARK)
    assert below == guide.tables(), "python deploy/prometheus/guide.py writes it anew"
    for name in everything():
        assert f"| `{name}` |" in below
    assert f"`metrics_version` (now {METRICS_VERSION})" in above
    assert f"{limits.REQUEST_SERIES_MAX} pairs" in above
    assert f"{claim_limits.TENANT_SERIES_MAX} pairs" in above


def _asked_for() -> Iterator[tuple[Path, str]]:
    folder = ROOT / "deploy"
    for path in (*folder.glob("prometheus/*.y*ml"), *folder.rglob("*.json"), folder / "RUNBOOK.md"):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # A recorded rule has colons around its metric's name.
        for name in re.findall(r"(?<![\w:-])doherty_[a-z_]+(?![\w:])", text):
            yield path, name


def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    asked = {name for path, name in _asked_for() if path.suffix != ".md"}
    unseen = [
        name
        for name in everything()
        if not asked & {name, *(f"{name}_{part}" for part in ("bucket", "sum", "count"))}
    ]
    assert unseen == []


def test_rules_dashboards_and_runbook_ask_only_for_what_there_is() -> None:
    served = set(everything())
    for name, family in everything().items():
        if family.kind == "histogram":
            served |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    asked = list(_asked_for())
    assert len(asked) > 50
    assert {(path.name, name) for path, name in asked if name not in served} == set()
