"""What the measurement of limits makes of answers."""

from __future__ import annotations

from collections import Counter

from loadtest.tenants.limits import Finding, Options, Used, sliding, table, under_way


def used(begun_s: float, tokens: int, ended_s: float = 0.0) -> Used:
    return Used(begun_s, begun_s, ended_s or begun_s, tokens)


def test_every_sliding_minute_has_its_tokens() -> None:
    answers = [used(119.99, 8), used(100.0, 1), used(59.99, 2), used(60.0, 4)]
    minutes = sliding(answers, 0.0, 121.0)
    assert len(minutes) == 4 * 61 + 1
    assert (minutes[0], minutes[1], minutes[240]) == (2, 6, 13)
    assert minutes[160] == 6  # from 40 to 100 s, and that moment is the next one's
    assert sliding(answers, 0.0, 59.0) == []


def test_how_many_were_under_way_at_a_time() -> None:
    assert under_way([used(0.0, 1, 2.0), used(1.0, 1, 3.0), used(2.0, 1, 4.0)]) == 2
    assert under_way([]) == 0


def test_the_table_says_what_was_let_in() -> None:
    finding = Finding(
        name="tokens", limit=1000, most=1000, least=989, answers=7, refused=Counter(a=2)
    )
    assert not finding.holds
    text = table(Options(), [finding])
    assert "200 clients, 4 workers" in text
    assert "100.00 %" in text
    assert "98.90 %" in text
    assert text.endswith("2 a")
