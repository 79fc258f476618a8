"""The view, made once for all who look, and only while somebody does.

While nobody looks, the counters that workers tell anyway are summed every few seconds, because
percentiles need a past; nothing is asked, and no view is made. While somebody does, one view is
made after each count, and encoded once, however many watch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from msgspec import structs

from proxy.contract import FleetSnapshot
from proxy.contract.regions import RemoteState
from proxy.contract.view import ProxyView, View, encode_view
from proxy.core.windows import History, Totals, Window
from proxy.io import view_tables as tables
from proxy.io.control import HotPrefix
from proxy.io.rings import Rings
from proxy.io.scaling_news import ScalingNews
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.admin")

FRESH_S = 0.25  # one that was made so shortly ago is told again: who asks in a loop costs little


class Source(Protocol):
    """What a view is made of; the supervisor has it."""

    def proxy(self) -> ProxyView:
        """Return what the proxy is, without what is counted."""

    def fleet(self) -> FleetSnapshot | None: ...

    def suspects(self) -> frozenset[str]: ...

    def remotes(self) -> list[RemoteState]: ...

    def counted(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of all workers as they told them last, unsummed."""

    def hot(self) -> list[HotPrefix]:
        """Return what is hot in each of the workers, as they told it last."""

    async def recount(self) -> None:
        """Have the workers tell all of this anew."""

    def take_lag_s(self) -> float:
        """Return the longest lateness of a worker's timers since this was asked last."""


class Viewing:
    """One writer, any number of readers."""

    def __init__(
        self,
        source: Source,
        scaling: ScalingNews,
        tasks: Tasks,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._scaling = scaling
        self._tasks = tasks
        self._rings = Rings()
        self._asking: asyncio.Task[None] | None = None
        self._now_s = now_s
        self._history = History()
        self._made_s = float("-inf")
        self._news = asyncio.Event()
        self._one_asks = asyncio.Lock()  # and the others are told the same
        self.watchers = 0
        self.closed = False
        self.number = 0  # of the newest
        self.body = b""  # the newest, as JSON

    # --- time --------------------------------------------------------------------------------

    def count(self) -> None:
        """The workers have told what they counted. They are asked again, whatever comes of it."""
        try:
            self._count(self._now_s())
        except Exception:  # noqa: BLE001 - a view, and not the counts that all else rests on
            _log.exception("making the view")

    def _count(self, now_s: float) -> None:
        if self.watchers:
            totals, gauges = self._sums(now_s)
            self._make(totals, gauges, now_s)
            self._follow()
        elif self._history.due(now_s):
            totals = self._totals(self._source.counted()[0], now_s)
        else:
            return
        self._keep(totals)

    def _keep(self, totals: Totals) -> None:
        if self._history.due(totals.at_s):
            self._history.keep(totals)

    def hurry(self) -> None:
        """Something has changed that whoever wished it wants to see."""
        self._made_s = float("-inf")
        if self.watchers:
            now_s = self._now_s()
            self._make(*self._sums(now_s), now_s)

    async def newest(self) -> bytes:
        """Return a view of now."""
        async with self._one_asks:
            if self._now_s() - self._made_s > FRESH_S:
                await asyncio.gather(self._source.recount(), self._ask())
                now_s = self._now_s()
                totals, gauges = self._sums(now_s)
                self._make(totals, gauges, now_s)
                self._keep(totals)  # else the first window would begin when workers next tell
        return self.body

    async def newer(self, number: int, wait_s: float) -> bool:
        """Wait until there is a view after this one; return whether there is."""
        if self.number <= number:
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                return False
        return self.number > number

    def viewed(self) -> bool:
        """Whether somebody watches."""
        return self.watchers > 0

    def _follow(self) -> None:
        """Find out, for the next view, what is not told unasked."""
        if self._asking is None or self._asking.done():
            self._asking = self._tasks.spawn("view", self._ask())

    async def _ask(self) -> None:
        await asyncio.gather(self._rings.follow(self._source.fleet()), self._scaling.ask())

    def close(self) -> None:
        """Let those who wait go: there will be no further view."""
        self.closed = True
        self._news.set()

    # --- the view ----------------------------------------------------------------------------

    def _sums(self, now_s: float) -> tuple[Totals, tables.Gauges]:
        counters, gauges = self._source.counted()
        return self._totals(counters, now_s), tables.gauges_of(gauges)

    def _totals(self, counters: list[Sample], now_s: float) -> Totals:
        fleet = self._source.fleet()
        return tables.totals_of(counters, fleet.replicas if fleet else (), now_s)

    def _make(self, totals: Totals, gauges: tables.Gauges, now_s: float) -> None:
        self.body = encode_view(self.view(totals, gauges, now_s))
        self._made_s = now_s
        self.number += 1
        self._news.set()
        self._news = asyncio.Event()

    def view(self, totals: Totals, gauges: tables.Gauges, now_s: float) -> View:
        source = self._source
        window = self._history.window(totals)
        proxy = self._proxy(gauges, window)
        replicas = tables.replica_views(
            *(source.fleet(), proxy.region, source.suspects(), gauges, window),
            self._rings.ratios(),
        )
        models = tables.model_views(window)
        return View(
            at_s=round(time.time(), 3),
            window_s=round(window.seconds, 3),
            proxy=proxy,
            replicas=replicas,
            classes=tables.class_views(gauges, window),
            models=models,
            rings=self._rings.views([model.model for model in models], source.hot()),
            pools=self._scaling.pools(),
            scaling=self._scaling.notes(),
            scaling_age_s=self._scaling.age_s,
            regions=tables.region_views(source.remotes(), gauges, now_s),
            decisions={
                reason: round(rate, 3)
                for reason, rate in window.rates("routing_decisions_total", "reason").items()
            },
            codes=tables.code_rates(window),
        )

    def _proxy(self, gauges: tables.Gauges, window: Window) -> ProxyView:
        requests = window.rates("requests_total", "")
        tokens = window.rates("generation_tokens_total", "")
        cached = tables.ratios(window, "prefix_cached_tokens_total", "prompt_tokens_total", "")
        return structs.replace(
            self._source.proxy(),
            in_flight=int(gauges["requests_in_flight"].get("", 0.0)),
            connections=int(gauges["client_connections"].get("", 0.0)),
            requests_per_s=round(requests.get("", 0.0), 3),
            errors_per_s=tables.errors_per_s(window),
            tokens_per_s=round(tokens.get("", 0.0), 1),
            cached_ratio=cached.get(""),
            loop_lag_s=round(self._source.take_lag_s(), 6),
        )
