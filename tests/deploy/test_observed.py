"""Metrics, rules and dashboards on a real `doherty up` under traffic, seen by a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.deploy.test_dashboards import queries
from tests.fakes.observed import Observed, observed
from tests.fakes.programs import fetch, until

pytestmark = [
    pytest.mark.faults,  # nothing fails here, but it is as large
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="no prometheus, no promtool (Debian's package prometheus)",
    ),
]

WINDOW = "30s"  # in place of `$__rate_interval`: longer than the traffic
# Panels that have nothing to show here, and why.
NO_DATA = {
    "one region": {
        *("Linked", "Round trips", "Age of summaries", "Draining", "Room there", "In flight there"),
        *("Sent", "Arrived and refused", "Replicas asked for"),
    },
    "nothing fails": {"Further attempts"},
    "no certificate": {"Days until certificates end"},
}
# Single queries of panels that have something else to show, by legend.
NO_SERIES = {
    ("Faults", "TLS {{reason}}"),
    ("Failures", "identity provider"),
    ("Age of what is known", "{{instance}} identity provider"),
    ("Links with other proxies", "failed: {{reason}} a second"),
    ("At the proxy", "{{outcome}}"),
    ("Starts after the first, of an hour", "{{replica}}"),
    ("Held for gone", "{{replica}}"),
    ("Next one due in", "__auto"),  # the batch is done
    ("Refused or given up", "{{outcome}}"),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed(tmp_path_factory.mktemp("observed")) as started:
        started.start_batch(20)
        statuses = Counter(started.traffic(120))
        started.oddities()
        time.sleep(1.5)  # a look of Prometheus at what has been counted, and one at its rules
        statuses += Counter(started.traffic(120))
        until(lambda: _seen(started), "all of it in Prometheus")
        assert statuses == {200: 240}
        yield started


def _seen(stage: Observed) -> bool:
    ok = stage.query('sum(doherty_requests_total{code="200",outcome="ok",route="chat"})')
    recorded = stage.query('class:doherty_slow_first_tokens:ratio_rate1h{class="online"}')
    done = stage.query("sum(doherty_offline_results_total)")
    return bool(
        ok
        and int(ok[0]["value"][1]) >= 240
        and recorded
        and done
        and int(done[0]["value"][1]) >= 20
    )


def test_every_page_is_clean_in_the_eyes_of_promtool(stage: Observed) -> None:
    for url in (stage.admin_url, stage.manager_url, stage.offline_url):
        run = _check(fetch(url + "/metrics").body)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", ""), url


def test_an_engines_page_has_only_the_flaws_of_the_names_that_it_imitates(stage: Observed) -> None:
    known = r"\S+ (metric names should not contain ':'|metric name should not include type '\w+')"
    urls = [target["scrapeUrl"] for target in stage.targets()["doherty-engines"]]
    assert len(urls) == 3
    for url in urls:
        for line in _check(fetch(url).body).stderr.splitlines():
            assert re.fullmatch(known, line), f"{url}: {line}"


def _check(page: bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", "check", "metrics"],
        input=page.decode(),
        text=True,
        capture_output=True,
        check=False,
        timeout=30,
    )


def test_prometheus_finds_the_engines_by_their_manager(stage: Observed) -> None:
    labels = [target["labels"] for target in stage.targets()["doherty-engines"]]
    found = {(each["replica"], each["pool"], each["engine"]) for each in labels}
    assert found == {
        ("chat-0", "chat", "simulator"),
        ("more-0", "more", "simulator"),
        ("jobs-0", "jobs", "simulator-jobs"),
    }
    (ours,) = stage.query(
        "sum by (replica) (vllm:num_requests_running) / sum by (replica) (doherty_replica_state)"
    )
    assert ours["metric"] == {"replica": "more-0"}


def test_the_services_speak_openmetrics(stage: Observed) -> None:
    accept = {"accept": "application/openmetrics-text;version=1.0.0"}
    for url in (stage.admin_url, stage.manager_url, stage.offline_url):
        page = fetch(url + "/metrics", headers=accept)
        assert page.headers["content-type"].startswith("application/openmetrics-text")
        assert page.text.endswith("# EOF\n")
        families = [family.name for family in text_string_to_metric_families(page.text)]
        assert any(name.startswith("doherty_") for name in families)
        assert "process_cpu_seconds" in families


def test_every_count_of_requests_is_the_same_number(stage: Observed) -> None:
    total = _one(stage, 'sum(doherty_requests_total{route="chat"})')
    assert total >= 240 + 3 + 3 + 1
    chat = '{route="chat"}'
    assert _one(stage, f"sum(doherty_request_duration_seconds_count{chat})") == total
    assert (
        _one(stage, 'sum(doherty_request_duration_seconds_bucket{route="chat",le="+Inf"})') == total
    )
    first = _one(stage, "sum(doherty_time_to_first_token_seconds_count)")
    assert first == _one(stage, "sum(doherty_class_time_to_first_token_seconds_count)")
    tokens = _one(stage, "sum(doherty_time_per_output_token_seconds_count)")
    assert tokens == _one(stage, "sum(doherty_class_time_per_output_token_seconds_count)")
    assert tokens == 180, "three of four of the requests were streams"
    left = _one(stage, 'sum(doherty_requests_total{outcome="client_gone"})')
    assert left == _one(stage, "sum(doherty_cancellations_total)") == 3


def _one(stage: Observed, expr: str) -> float:
    (found,) = stage.query(expr)
    return float(found["value"][1])


def test_nothing_fires_where_all_is_well(stage: Observed) -> None:
    firing = [each["metric"]["alertname"] for each in stage.query('ALERTS{alertstate="firing"}')]
    assert firing == []


def test_every_panel_has_something_to_show(stage: Observed) -> None:
    empty: list[tuple[str, str]] = []
    shown: set[str] = set()
    for title, legend, expr in queries(WINDOW):
        if stage.query(expr):
            shown.add(title)
        else:
            empty.append((title, legend))
    excused = set().union(*NO_DATA.values())
    assert [each for each in empty if each[0] not in excused and each not in NO_SERIES] == []
    assert excused & shown == set(), "these have data here after all"
    assert len(shown) > 60


def test_every_variable_has_values(stage: Observed) -> None:
    """`label_values(metric, label)` of a dashboard is Prometheus' label values of that metric."""
    for path in sorted((Path(__file__).parents[2] / "deploy/grafana/dashboards").glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                assert _values(stage, variable["definition"]), variable["definition"]


def _values(stage: Observed, definition: str) -> list[Any]:
    match = re.fullmatch(r"label_values\((\w+), (\w+)\)", definition)
    assert match is not None, definition
    url = f"{stage.prometheus_url}/api/v1/label/{match[2]}/values?match[]={match[1]}"
    return list(fetch(url).value["data"])
