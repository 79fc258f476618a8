"""The page's own arithmetic, run where it runs: numbers for people, events, the last minutes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.browser import Browser
from tests.fakes.dashboard_server import DashboardServer
from tests.fakes.views import a_view

NONE = "\N{EN DASH}"


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Browser]:
    with DashboardServer(a_view(2)) as server:
        browser.open(server.url)
        yield browser
        browser.driver.get("about:blank")


CASES = [
    ("count", 0, "0"),
    ("count", 0.004, "<0.01"),
    ("count", 0.42, "0.42"),
    ("count", 9.96, "10"),
    ("count", 999.4, "999"),
    ("count", 999.6, "1.0k"),
    ("count", 12_345, "12.3k"),
    ("count", 999_960, "1.0M"),
    ("count", 2.5e9, "2.5G"),
    ("count", None, NONE),
    ("percent", None, NONE),
    ("percent", 0, "0 %"),
    ("percent", 0.0004, "<0.1 %"),
    ("percent", 0.0996, "10 %"),
    ("percent", 0.056, "5.6 %"),
    ("percent", 1, "100 %"),
    ("duration", None, NONE),
    ("duration", 0, "0 s"),
    ("duration", 0.00042, "420 µs"),
    ("duration", 0.0042, "4.2 ms"),
    ("duration", 0.0384, "38 ms"),
    ("duration", 0.9996, "1.00 s"),
    ("duration", 2.414, "2.41 s"),
    ("duration", 14.2, "14.2 s"),
    ("duration", 192, "3 m 12 s"),
    ("duration", 3599.6, "1 h 0 m"),
    ("duration", 18_120, "5 h 2 m"),
    ("duration", 400_000, "5 days"),
    ("octets", 999, "999 B"),
    ("octets", 4_700, "4.7 kB"),
    ("octets", 47_000, "47 kB"),
    ("octets", None, NONE),
    ("ago", None, "never"),
    ("ago", 0.3, "now"),
    ("ago", 12.2, "12 s ago"),
    ("ago", 300, "5 m ago"),
    ("ago", 7200, "2 h ago"),
]


def test_numbers_have_three_digits_and_a_unit(page: Browser) -> None:
    said = page.run(
        "const format = await import('./format.js');"
        "return given[0].map(([name, value]) => format[name](value));",
        [case[:2] for case in CASES],
    )
    assert [(*case[:2], words) for case, words in zip(CASES, said, strict=True)] == CASES


def test_events_are_read_however_they_are_cut(page: Browser) -> None:
    text = (
        ": hello\n\nevent: view\ndata: 1\n\ndata: 2\r\ndata:3\r\n\r\n"
        "event: other\ndata: 4\n\ndata: 5\n\ndata: 6"
    )
    said = page.run(
        """const { Events } = await import('./feed.js'), found = [];
        for (const size of [1, 2, 3, 7, 1000]) {
          const events = new Events(), met = [];
          for (let at = 0; at < given[0].length; at += size) {
            met.push(...events.take(given[0].slice(at, at + size)));
          }
          found.push(met);
        }
        return found;""",
        text,
    )
    assert said == [["1", "2\n3", "5"]] * 5


def test_the_course_of_a_number_has_gaps_where_nothing_was_heard(page: Browser) -> None:
    found = page.run(
        """const { History } = await import('./history.js'), history = new History();
        for (let at = 0; at < 400; at += 1) {
          const late = at > 390 ? [["b", at === 395 ? null : 1]] : [];
          history.take(at, [["a", at], ...late]);
        }
        const [a, b] = ["a", "b"].map((name) => [...history.points(name)]);
        const heard = b.filter(([, value]) => !Number.isNaN(value)).length;
        history.take(10, [["a", 1]]);
        return [a.length, a[0], a.at(-1), heard, [...history.points("a")].length];"""
    )
    assert found == [300, [299, 100], [0, 399], 8, 1]
