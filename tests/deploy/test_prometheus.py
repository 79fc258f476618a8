"""Rules and alerts, judged by Prometheus' own promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.alert_cases import CASES, Case

_FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
_SEVERITIES = {"critical", "warning", "info"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool (Debian's package prometheus)"
)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((_FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> list[dict[str, Any]]:
    groups = yaml.safe_load((_FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_every_alert_says_what_it_is_about_and_where_to_read_on() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(names) == len(set(names)) > 30
    for alert in alerts():
        assert re.fullmatch(r"Doherty[A-Z][A-Za-z]+", alert["alert"])
        assert alert["labels"]["severity"] in _SEVERITIES
        assert "for" in alert
        told = alert["annotations"]
        assert told["summary"]
        assert told["description"]
        assert told["runbook_url"] == f"deploy/RUNBOOK.md#{alert['alert'].lower()}"


def test_every_alert_has_cases() -> None:
    assert {f"Doherty{case.alert}" for case in CASES} == {alert["alert"] for alert in alerts()}


def _judgement(case: Case, series: dict[str, str], count: int) -> dict[str, Any]:
    firing = f'count(ALERTS{{alertname="Doherty{case.alert}",alertstate="firing"}}) or vector(0)'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": case.at,
                "exp_samples": [{"labels": "{}", "value": count}],
            }
        ],
    }


def _rules_of(case: Case) -> dict[str, Any]:
    """Return the alert and what it asks for: all rules, in every minute of a day, take long."""
    rules = {rule["record"]: rule for rule in recorded()}
    alert = next(each for each in alerts() if each["alert"] == f"Doherty{case.alert}")
    asked = [rules[name] for name in re.findall(r"\w+:\w+:\w+", alert["expr"])]
    return {"groups": [{"name": "case", "rules": [*asked, alert]}]}


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_when_it_should_not(tmp_path: Path) -> None:
    files = []
    for number, case in enumerate(CASES):
        rules, judged = tmp_path / f"{number}-rules.yaml", tmp_path / f"{number}.yaml"
        rules.write_text(json.dumps(_rules_of(case)))
        both = ((case.fires, case.count), (case.quiet, 0))
        page = {
            "rule_files": [str(rules)],
            "evaluation_interval": "10m" if int(case.at[:-1]) > 60 else "1m",
            "tests": [_judgement(case, dict(series), count) for series, count in both],
        }
        judged.write_text(json.dumps(page))
        files.append(str(judged))
    run = promtool("test", "rules", *files)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("SUCCESS") == len(CASES)


@needs_promtool
def test_promtool_takes_configuration_and_rules() -> None:
    run = promtool("check", "config", str(_FOLDER / "prometheus.yml"))
    assert run.returncode == 0, run.stdout + run.stderr
    rules = (str(_FOLDER / name) for name in ("rules.yaml", "alerts.yaml"))
    run = promtool("check", "rules", "--lint=all", "--lint-fatal", *rules)
    assert run.returncode == 0, run.stdout + run.stderr
