"""The form in which each service declares its Prometheus metrics: once, in a list.

From the lists come the `# HELP` and `# TYPE` lines of every page and the table of
`deploy/guides/metrics.md`; a test holds pages, dashboards, rules and table to them. So a name
cannot change unseen. What may change is written down there: names and labels are added in any
release; one is renamed or taken away only with `METRICS_VERSION`, which `build_info` tells, after a
release in which both names are served.

Imports nothing of ours.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

METRICS_VERSION: Final = 1
PREFIX: Final = "doherty_"


class Family(msgspec.Struct, frozen=True):
    """One metric of a service: a counter with its `_total`, all without their service's prefix."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()  # of a histogram's buckets, +Inf left out
    largest: bool = False  # of what several workers say the largest counts, not the sum

    @property
    def bare(self) -> str:
        """The name as clients of Prometheus want it for a family."""
        return self.name.removesuffix("_total")


def table(*families: Family) -> dict[str, Family]:
    """Return them by name, each once."""
    found = {family.name: family for family in families}
    assert len(found) == len(families)
    return found


def counter(name: str, labels: str, text: str) -> Family:
    """`labels` are words with spaces between them."""
    return Family(name, "counter", text, tuple(labels.split()))


def gauge(name: str, labels: str, text: str, *, largest: bool = False) -> Family:
    return Family(name, "gauge", text, tuple(labels.split()), largest=largest)


def histogram(name: str, labels: str, text: str, edges: tuple[float, ...]) -> Family:
    return Family(name, "histogram", text, tuple(labels.split()), edges)
