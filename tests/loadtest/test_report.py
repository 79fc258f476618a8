"""What is printed, written and drawn."""

import json
from pathlib import Path

import pytest

from loadtest import plot, report
from loadtest.measure import Outcome, summarise
from loadtest.run import Options, Run, complaint


def made_run(label: str = "t", *, ttft_s: float = 0.5, cached_tokens: int | None = 60) -> Run:
    outcomes = [
        Outcome(
            index=i,
            scheduled_s=float(i),
            sent_s=float(i),
            ended_s=i + 2.0,
            first_content_s=i + ttft_s,
            last_content_s=i + ttft_s + 1.0,
            prompt_tokens=100,
            cached_tokens=cached_tokens,
            output_tokens=11,
            replica=f"demo-{i % 2}",
        )
        for i in range(6)
    ]
    lost = Outcome(index=6, scheduled_s=6, sent_s=6, ended_s=6, error="cut", detail="torn off")
    return Run(
        label=label,
        settings=Options(api_key="secret", url="http://u:secret@h:1").shown(),
        model="demo",
        request_count=8,
        interrupted=False,
        outcomes=(*outcomes, lost),
        summary=summarise([*outcomes, lost], 1, hit_rate_bound=0.75),
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000194, "19 us"),
        (0.0123, "12.3 ms"),
        (0.0996, "100 ms"),
        (1.2345, "1,234 ms"),
        (12.34, "12.3 s"),
    ],
)
def test_durations_are_written_to_be_read(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_the_closing_table_says_it_all() -> None:
    lines = {
        line[2:34].strip(): line[34:].strip()
        for line in report.run_table(made_run()).splitlines()[1:]
    }
    assert lines["requests"] == "6 measured after 1 of warm-up"
    assert lines["errors"] == "cut 1 (torn off)"
    assert lines["hit rate"] == "60.0 % (bound 75.0 %)"
    assert lines["TTFT p50 / p95 / p99"] == "500 ms / 500 ms / 500 ms"
    assert lines["time per output token p50 / p99"] == "100 ms / 100 ms"
    assert lines["replica demo-1"].startswith("60.0 % of requests, 60.0 % of prompt tokens, 120")
    assert lines["work, max / mean"] == "1.20"
    assert lines["client lateness p99 / max"] == "0 us / 0 us"
    assert lines["duration"] == "6,000 ms"


def test_a_server_that_hides_its_cache_is_said_so() -> None:
    table = report.run_table(made_run(cached_tokens=None))
    assert "the server does not report them" in table
    assert "- (bound 75.0 %)" in table


def test_json_holds_settings_figures_and_every_request_but_no_secret() -> None:
    text = report.to_json(report.run_value(made_run()))
    assert b"secret" not in text
    value = json.loads(text)
    assert value["settings"]["url"] == "http://h:1"
    assert value["summary"]["hit_rate"] == 0.6
    assert value["summary"]["errors"] == {"cut": 1}
    columns = value["requests"]
    assert {len(column) for column in columns.values()} == {7}
    assert columns["ttft_s"] == [0.5] * 6 + [None]
    assert columns["error"][-1] == "cut"


def test_a_comparison_puts_policies_side_by_side() -> None:
    table = report.comparison_table(
        {
            "round_robin": [made_run(ttft_s=0.4), made_run(ttft_s=0.8), made_run(ttft_s=0.6)],
            "prefix": [made_run(ttft_s=0.3)],
        }
    )
    head, *rows = table.splitlines()
    assert head.split() == ["round_robin", "prefix"]
    ttft = next(row for row in rows if row.startswith("TTFT p50"))
    assert "600 ms [400 ms to 800 ms]" in ttft
    assert "300 ms (x0.50)" in ttft
    assert any(row.startswith("hit rate") and "60.0 % (x1.00)" in row for row in rows)
    assert any(row.endswith("60% 40%") for row in rows)


def test_nothing_known_is_a_dash() -> None:
    row = report.comparison_table({"a": [made_run(cached_tokens=None)]}).splitlines()[1]
    assert row.split() == ["hit", "rate", "-"]


def test_only_a_complete_failure_is_a_complaint() -> None:
    run = made_run()
    assert complaint(run.outcomes, "u") is None
    assert complaint((), "u") is None
    assert complaint(run.outcomes[-1:], "u") == "u: every request failed: 1 x cut (torn off)"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn_small_and_labelled(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{suffix}"
    plot.check(str(path))
    plot.draw({"round_robin": [made_run()], "prefix": [made_run(), made_run()]}, "T", str(path))
    content = path.read_bytes()
    assert 1000 < len(content) < 500_000
    if suffix == "svg":
        assert content.count(b"time to first token (s") == 1
        assert b"hit rate (% of prompt tokens)" in content
        assert b"prefix (60.0 % in all)" in content


@pytest.mark.parametrize(
    ("path", "problem"),
    [("x.pdf", "must end in"), ("/nonexistent/x.png", "no such folder")],
)
def test_a_plot_that_cannot_be_made_is_refused_at_once(path: str, problem: str) -> None:
    with pytest.raises(plot.PlotError, match=problem):
        plot.check(path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(plot.PlotError, match="pip install"):
        plot.check("x.png")
