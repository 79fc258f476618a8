"""What the measurement of limits makes of answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from loadtest.tenants import proxies
from loadtest.tenants.limits import Finding, Options, Used, came, sliding, table, under_way


def used(first_s: float, last_s: float) -> Used:
    return Used("a", first_s, last_s, 1)


def test_every_sliding_minute_has_its_tokens() -> None:
    answers = [(119.99, 8), (100.0, 1), (59.99, 2), (60.0, 4)]
    minutes = sliding(answers, 0.0, 121.0)
    assert len(minutes) == 4 * 61 + 1
    assert (minutes[0], minutes[1], minutes[240]) == (2, 6, 13)
    assert minutes[160] == 6  # from 40 to 100 s, and that moment is the next one's
    assert sliding(answers, 0.0, 59.0) == []


def test_how_many_were_under_way_at_a_time() -> None:
    assert under_way([used(0.0, 2.0), used(1.0, 3.0), used(2.0, 4.0)]) == 2
    assert under_way([]) == 0


def test_when_requests_came_the_access_log_says(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    log.write_text('{"request_id":"a","at":10.5,"duration_ms":1500.0}\n')
    assert came(log) == {"a": 9.0}


def test_the_table_says_what_was_let_in() -> None:
    finding = Finding(
        name="tokens", limit=1000, most=1000, least=989, mean=995.0, answers=7, refused=Counter(a=2)
    )
    assert not finding.holds
    text = table(Options(), [finding])
    assert "200 clients, 4 workers" in text
    assert "100.00 %" in text
    assert "98.90 %" in text
    assert text.endswith("2 a")


def test_what_two_proxies_let_in_beyond_a_limit_is_told_in_its_time() -> None:
    finding = proxies.Finding(rate=50, limit=250, let_in=[250, 254], other={})
    assert finding.beyond_ms == [0.0, 80.0]
    assert "0 (0 ms), 4 (80 ms)" in proxies.table(proxies.Options(), [finding])
