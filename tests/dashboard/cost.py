"""What one view costs the browser: `python -m tests.dashboard.cost [REPLICAS ...]`.

For each size of fleet, views of which every number changes come ten times a second. Told are the
octets of a view, the time to read it (JSON), and the time to draw it, by the page's own clock and
by the browser's (script, style and layout), each for the median view.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time

import msgspec

from proxy.contract.view import View, encode_view
from tests.fakes.browser import Browser, missing
from tests.fakes.dashboard_server import DashboardServer
from tests.fakes.views import a_view

VIEWS = 60
DRAWN = """
const took = [], read = [];
const view = await (await fetch(given[1])).text();
for (let n = 0; n < 20; n += 1) {
  const begun = performance.now();
  JSON.parse(view);
  read.push(performance.now() - begun);
}
await new Promise((done) => new PerformanceObserver((list, self) => {
  took.push(...list.getEntriesByName("doherty-draw").map(({ duration }) => duration));
  if (took.length >= given[0]) { self.disconnect(); done(); }
}).observe({ type: "measure" }));
return [took, read];
"""


def views_of(replicas: int, drawn: View) -> list[bytes]:
    """Return views that differ in every number; the fleet and the ring are the same."""
    found = []
    for seed in range(6):
        other = a_view(replicas, seed)
        moved = tuple(
            msgspec.structs.replace(there, replica_id=here.replica_id, pool=here.pool)
            for here, there in zip(drawn.replicas, other.replicas, strict=True)
        )
        fields = {"replicas": moved, "proxy": other.proxy, "classes": other.classes}
        found.append(encode_view(msgspec.structs.replace(drawn, **fields)))
    return found


def measure(browser: Browser, replicas: int) -> str:
    drawn = a_view(replicas)
    views, over = views_of(replicas, drawn), threading.Event()
    with DashboardServer(drawn, interval_s=0.1) as server:

        def change() -> None:
            turn = 0
            while not over.wait(0.05):
                server.view = views[turn := (turn + 1) % len(views)]

        changing = threading.Thread(target=change)
        changing.start()
        try:
            browser.open(server.url)
            browser.until("document.body.dataset.drawn")
            time.sleep(1.0)  # until what runs often is compiled
            before = metrics(browser)
            took_ms, read_ms = browser.run(DRAWN, VIEWS, f"{server.url}view")
            after = metrics(browser)
        finally:
            over.set()
            changing.join()
    kinds = ("ScriptDuration", "RecalcStyleDuration", "LayoutDuration")
    spent = ", ".join(
        f"{kind.removesuffix('Duration').lower()} {1e3 * (after[kind] - before[kind]) / VIEWS:.1f}"
        for kind in kinds
    )
    return (
        f"{replicas:4d} replicas: {len(views[0]) / 1e3:.0f} kB a view, read in "
        f"{statistics.median(read_ms):.1f} ms, drawn in {statistics.median(took_ms):.1f} ms "
        f"(p95 {sorted(took_ms)[int(0.95 * len(took_ms))]:.1f}); by the browser, ms a view: {spent}"
    )


def metrics(browser: Browser) -> dict[str, float]:
    browser.command("Performance.enable")
    found = browser.command("Performance.getMetrics")["metrics"]
    return {entry["name"]: entry["value"] for entry in found}


def main() -> int:
    parser = argparse.ArgumentParser(description="What one view costs the browser.")
    parser.add_argument("replicas", nargs="*", type=int, default=[8, 100, 500])
    options = parser.parse_args()
    if reason := missing():
        sys.stderr.write(f"{reason}\n")
        return 1
    with Browser() as browser:
        for replicas in options.replicas:
            sys.stdout.write(measure(browser, replicas) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
