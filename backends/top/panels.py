"""A view as panels: what is on the screen's head, and one or two tables under each number.

Every table has its rows in an order that does not jump from one second to the next, but for those
that are ordered by what is most at the moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from backends.top import words
from backends.top.table import Cell, Column, Row, Table, Tone, cell
from proxy.contract.view import (
    ClassView,
    ModelView,
    NoteView,
    Percentiles,
    PoolView,
    ProxyView,
    RegionView,
    RingView,
    View,
)

HOLDERS_SHOWN = 4
LAG_BUSY_S, LAG_LONG_S = 0.02, 0.2
FLEET_OLD_S = 10.0  # by then a manager that lives has been heard of several times
SHORT_TITLES = ("replicas", "classes", "models", "pools", "routing", "prefixes")


def header(view: View) -> list[list[Cell]]:
    """Return the lines above the panels: who, how it goes, and whether it is well."""
    proxy = view.proxy
    return [_who(proxy, view.at_s), _rates(proxy, view.window_s)]


def classes_table(view: View) -> Table:
    columns = (
        Column("CLASS", width_min=11),
        Column("QUEUED", right=True, width_min=6),
        Column("OLDEST", right=True, width_min=6),
        Column("REQ/S", right=True, width_min=5),
        Column("REFUSED", right=True, width_min=7),
        Column("TTFT50", rank=2, right=True, width_min=6),
        Column("TTFT95", rank=3, right=True, width_min=6),
        Column("TTFT99", right=True, width_min=6),
        Column("TPOT50", rank=1, right=True, width_min=6),
        Column("TPOT95", rank=5, right=True, width_min=6),
        Column("TPOT99", rank=1, right=True, width_min=6),
        Column("WAIT50", rank=6, right=True, width_min=6),
        Column("WAIT95", rank=6, right=True, width_min=6),
        Column("WAIT99", rank=4, right=True, width_min=6),
        Column("BYTES", rank=7, right=True, width_min=7),
    )
    rows = tuple(Row(one.work_class, _class_cells(one)) for one in view.classes)
    return Table("classes", columns, rows, "no class has been asked for")


def models_table(view: View) -> Table:
    columns = (
        Column("MODEL", width_min=16, width_max=44),
        Column("REQ/S", right=True, width_min=5),
        Column("TOKENS/S", right=True, width_min=8),
        Column("CACHED", right=True, width_min=6),
        Column("TTFT50", right=True, width_min=6),
        Column("TTFT95", rank=2, right=True, width_min=6),
        Column("TTFT99", right=True, width_min=6),
        Column("TPOT50", rank=1, right=True, width_min=6),
        Column("TPOT95", rank=3, right=True, width_min=6),
        Column("TPOT99", rank=1, right=True, width_min=6),
    )
    rows = tuple(Row(one.model, _model_cells(one)) for one in view.models)
    return Table("models", columns, rows, "no model has been asked for")


def pools_table(view: View) -> Table:
    columns = (
        Column("POOL", width_min=12, width_max=32),
        Column("CLASS", rank=2, width_min=11),
        Column("WANTED", right=True),
        Column("READY", right=True),
        Column("COMING", right=True),
        Column("GOING", rank=1, right=True),
        Column("RESTING", rank=1, right=True),
        Column("MIN-MAX", right=True, width_min=7),
        Column("MODEL", rank=5, width_max=40),
        Column("WAITS FOR", rank=4, width_max=60),
    )
    rows = tuple(Row(pool.pool, _pool_cells(pool)) for pool in view.pools)
    return Table("pools", columns, rows, "no pools: no manager, or it does not answer")


def notes_table(view: View) -> Table:
    columns = (
        Column("TIME UTC", width_min=8),
        Column("POOL", width_min=12, width_max=32),
        Column("FROM-TO", width_min=7),
        Column("WHY", width_min=16, width_max=90),
        Column("MOVES", rank=1, width_max=60),
    )
    rows = tuple(Row(f"{note.at_s:.3f} {note.pool}", _note_cells(note)) for note in view.scaling)
    return Table("scaling decisions", columns, rows, "none yet")


def decisions_table(view: View) -> Table:
    """Return why replicas were chosen, and what clients were answered, beside each other."""
    columns = (
        Column("REASON", width_min=20, width_max=36),
        Column("A SECOND", right=True, width_min=8),
        Column("SHARE", right=True, width_min=6),
    )
    return Table(
        "choices of a replica", columns, _shares(view.decisions), "nothing was chosen of late"
    )


def codes_table(view: View) -> Table:
    columns = (
        Column("STATUS", width_min=20, width_max=36),
        Column("A SECOND", right=True, width_min=8),
        Column("SHARE", right=True, width_min=6),
    )
    rows = _shares(view.codes, bad=("5",), busy=("4",))
    return Table("answers", columns, rows, "nothing was answered of late")


def regions_table(view: View) -> Table:
    columns = (
        Column("REGION", width_min=12, width_max=28),
        Column("LINK", width_min=8),
        Column("ROUND TRIP", right=True),
        Column("HEARD", right=True, width_min=6),
        Column("IN FLIGHT", right=True),
        Column("PEER", rank=1, width_max=48),
    )
    rows = tuple(Row(f"{one.region} {one.peer}", _region_cells(one)) for one in view.regions)
    return Table("other regions", columns, rows, "none")


def prefixes_table(view: View) -> Table:
    columns = (
        Column("PREFIX", width_min=16, width_max=20),
        Column("HEAT", right=True, width_min=5),
        Column("SIZE", right=True, width_min=8),
        Column("SPREAD", rank=1, right=True),
        Column("HOME", width_min=10, width_max=28),
        Column("HELD BY", rank=1, width_min=10, width_max=100),
        Column("MODEL", rank=2, width_max=40),
    )
    found = [(prefix.heat, ring.model, prefix) for ring in view.rings for prefix in ring.prefixes]
    found.sort(key=lambda item: (-item[0], item[1], item[2].name))
    rows = []
    for heat, model, prefix in found:
        spread = str(prefix.spread) if prefix.spread else words.UNKNOWN
        size, home = words.octets(prefix.octets), prefix.home or words.UNKNOWN
        texts = (prefix.name, words.rate(heat), size, spread, home, _holders(prefix.holders), model)
        rows.append(Row(f"{model} {prefix.name}", tuple(map(cell, texts))))
    return Table("hot prefixes", columns, tuple(rows), "none is hot: requests share no prefix")


def ring_table(view: View) -> Table:
    """Return whose the ring is, model by model: the sum of each replica's arcs."""
    columns = (
        Column("MODEL", width_min=16, width_max=44),
        Column("REPLICAS", right=True),
        Column("LEAST", right=True, width_min=6),
        Column("MOST", right=True, width_min=6),
        Column("OF", rank=1, width_max=28),
    )
    rows = tuple(Row(ring.model, _ring_cells(ring)) for ring in view.rings if ring.arcs)
    return Table("rings", columns, rows, "no ring: no replica serves")


def panel_tables(view: View, panel: int) -> tuple[Table, ...]:
    """Return the tables of a panel other than the replicas', the main one first."""
    makers = (
        (),
        (classes_table, codes_table),
        (models_table,),
        (pools_table, notes_table),
        (decisions_table, regions_table),
        (prefixes_table, ring_table),
    )
    return tuple(make(view) for make in makers[panel])


def _who(proxy: ProxyView, at_s: float) -> list[Cell]:
    if proxy.draining:
        well = Cell("DRAINING", Tone.BUSY)
    elif proxy.not_ready:
        well = cell(f"NOT READY: {proxy.not_ready}", Tone.BAD)
    else:
        well = Cell("READY", Tone.GOOD)
    workers = f"{proxy.workers} worker" + ("" if proxy.workers == 1 else "s")
    return [
        cell(f"doherty {proxy.version}"),
        well,
        cell(proxy.region),
        cell(f"policy {proxy.policy}"),
        Cell(workers, Tone.PLAIN if proxy.workers else Tone.BAD),
        Cell(f"{words.clock(at_s)} UTC", Tone.FAINT),
    ]


def _rates(proxy: ProxyView, window_s: float) -> list[Cell]:
    errors, lag, fleet = proxy.errors_per_s, proxy.loop_lag_s, proxy.fleet_age_s
    old = fleet is None or (proxy.manager_url is not None and fleet > FLEET_OLD_S)
    return [
        Cell(f"req/s {words.rate(proxy.requests_per_s)}"),
        Cell(f"err/s {words.rate(errors)}", Tone.BAD if errors else Tone.PLAIN),
        Cell(f"tok/s {words.count(proxy.tokens_per_s)}"),
        Cell(f"hit {words.ratio(proxy.cached_ratio)}"),
        Cell(f"inflight {words.count(proxy.in_flight)}"),
        Cell(f"lag {words.seconds(lag)}", _lag_tone(lag)),
        Cell(f"fleet {words.age(fleet)}", Tone.BUSY if old else Tone.PLAIN),
        Cell(f"conns {words.count(proxy.connections)}"),
        Cell(f"of {window_s:.0f} s", Tone.FAINT),
    ]


def _lag_tone(lag_s: float | None) -> Tone:
    if lag_s is None or lag_s < LAG_BUSY_S:
        return Tone.PLAIN
    return Tone.BUSY if lag_s < LAG_LONG_S else Tone.BAD


def _three(percentiles: Percentiles) -> tuple[Cell, ...]:
    values = (percentiles.p50_s, percentiles.p95_s, percentiles.p99_s)
    return tuple(Cell(words.seconds(value)) for value in values)


def _class_cells(one: ClassView) -> tuple[Cell, ...]:
    return (
        cell(one.work_class),
        Cell(words.count(one.depth), Tone.BUSY if one.depth else Tone.PLAIN),
        Cell(words.seconds(one.oldest_s)),
        Cell(words.rate(one.requests_per_s)),
        Cell(words.rate(one.refused_per_s), Tone.BAD if one.refused_per_s else Tone.PLAIN),
        *_three(one.first_token),
        *_three(one.token),
        *_three(one.queue_wait),
        Cell(words.octets(one.queue_bytes)),
    )


def _model_cells(one: ModelView) -> tuple[Cell, ...]:
    return (
        cell(one.model),
        Cell(words.rate(one.requests_per_s)),
        Cell(words.count(one.tokens_per_s)),
        Cell(words.ratio(one.cached_ratio)),
        *_three(one.first_token),
        *_three(one.token),
    )


def _pool_cells(pool: PoolView) -> tuple[Cell, ...]:
    short = pool.ready < pool.desired
    return (
        cell(pool.pool),
        cell(pool.work_class),
        Cell(str(pool.desired)),
        Cell(str(pool.ready), Tone.BUSY if short else Tone.GOOD),
        Cell(str(pool.coming)),
        Cell(str(pool.going)),
        Cell(str(pool.resting)),
        Cell(f"{pool.min}-{pool.max}" if pool.scaled else "fixed"),
        cell(pool.model),
        cell(pool.waiting, Tone.BUSY),
    )


def _note_cells(note: NoteView) -> tuple[Cell, ...]:
    up = note.desired > note.was
    return (
        Cell(words.clock(note.at_s)),
        cell(note.pool),
        Cell(f"{note.was} to {note.desired}", Tone.BUSY if up else Tone.PLAIN),
        cell(note.reason),
        cell("; ".join(note.moves)),
    )


def _shares(
    rates: Mapping[str, float], bad: tuple[str, ...] = (), busy: tuple[str, ...] = ()
) -> tuple[Row, ...]:
    total = sum(rates.values())
    rows = []
    for name, value in sorted(rates.items()):
        tone = Tone.BAD if name.startswith(bad or ("\0",)) else Tone.PLAIN
        tone = Tone.BUSY if busy and name.startswith(busy) else tone
        part = words.share(value / total) if total else words.UNKNOWN
        rows.append(Row(name, (cell(name, tone), Cell(words.rate(value)), Cell(part))))
    return tuple(rows)


def _region_cells(one: RegionView) -> tuple[Cell, ...]:
    link, tone = ("linked", Tone.GOOD) if one.linked else ("cut", Tone.BAD)
    if one.linked and one.draining:
        link, tone = "draining", Tone.BUSY
    return (
        cell(one.region),
        Cell(link, tone),
        Cell(words.seconds(one.round_trip_s)),
        Cell(words.age(one.summary_age_s)),
        Cell(words.count(one.inflight)),
        cell(one.peer),
    )


def _holders(holders: tuple[str, ...]) -> str:
    if not holders:
        return words.UNKNOWN
    rest = len(holders) - HOLDERS_SHOWN
    return ", ".join(holders[:HOLDERS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _ring_cells(ring: RingView) -> tuple[Cell, ...]:
    owned: dict[str, float] = defaultdict(float)
    for arc in ring.arcs:
        owned[arc.replica_id] += arc.end - arc.begin
    most = max(owned, key=lambda name: (owned[name], name))
    return (
        cell(ring.model),
        Cell(str(len(owned))),
        Cell(words.share(min(owned.values()))),
        Cell(words.share(owned[most])),
        cell(most),
    )
