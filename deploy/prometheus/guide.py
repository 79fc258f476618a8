"""Writes the tables of deploy/guides/metrics.md, from the lists from which the pages are made.

    python deploy/prometheus/guide.py

What stands above the mark is a person's. A test holds what is below it to what this writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from backends.metric_lists import (
    ENGINE_WORKER,
    ENGINE_WORKER_PREFIX,
    MANAGER,
    MANAGER_PREFIX,
    OFFLINE,
    OFFLINE_PREFIX,
)
from proxy.contract.metrics import PREFIX, Family
from proxy.io.families import FAMILIES

GUIDE = Path(__file__).resolve().parents[1] / "guides" / "metrics.md"
MARK = "<!-- below: made by deploy/prometheus/guide.py -->\n"
SERVICES = (
    ("The proxy", PREFIX, FAMILIES, "`/metrics` of the admin listener, 127.0.0.1:8001"),
    ("The manager", MANAGER_PREFIX, MANAGER, "`/metrics` of its API, 127.0.0.1:8002"),
    ("The offline service", OFFLINE_PREFIX, OFFLINE, "`/metrics` of its port, 127.0.0.1:8003"),
    (
        "An engine worker",
        ENGINE_WORKER_PREFIX,
        ENGINE_WORKER,
        "`/metrics` of its port; the manager lists it among the targets",
    ),
)


def tables() -> str:
    """Return what is below the mark."""
    return "".join(_service(*service) for service in SERVICES)


def _service(title: str, prefix: str, families: Mapping[str, Family], where: str) -> str:
    head = "| metric | type | labels | meaning |\n|---|---|---|---|"
    rows = "\n".join(_rows(prefix, families))
    return f"\n## {title}\n\n{where}.\n\n{head}\n{rows}\n"


def _rows(prefix: str, families: Mapping[str, Family]) -> Iterator[str]:
    for family in families.values():
        labels = ", ".join(f"`{label}`" for label in family.labels)
        text = family.text + (" (*largest*)" if family.largest else "")
        if family.edges:
            text += f"; {len(family.edges)} buckets, {family.edges[0]:g} to {family.edges[-1]:g} s"
        yield f"| `{prefix}{family.name}` | {family.kind} | {labels} | {text} |"


if __name__ == "__main__":
    above = GUIDE.read_text(encoding="utf-8").partition(MARK)[0]
    GUIDE.write_text(above + MARK + tables(), encoding="utf-8")
