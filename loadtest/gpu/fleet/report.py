"""The text of a record: what it was measured on, the cells, the targets, the lab beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from loadtest.gpu.fleet import judge, lab, load, planned, targets
from loadtest.gpu.fleet.judge import Figures, Group
from loadtest.gpu.fleet.lab import Foretold, Pool
from loadtest.gpu.fleet.planned import Considered
from loadtest.gpu.fleet.record import Burst, Capacity, CellKey, Record, Row, Setting
from loadtest.measure import quantile
from loadtest.policies.tables import aligned
from loadtest.traces import TraceError

HEAD = [
    "cell", "n", "errors", "TTFT p50", "p95", "p99", "per token p50", "p99",
    "answer p50", "p95", "tokens/s", "good/s", "hit", "engine's", "work max/mean", "of capacity",
    "CPU s/1000", "start s", "MiB",
]  # fmt: skip


def text_of(record: Record, plan: Mapping[int, Considered] | None = None) -> tuple[str, int]:
    """Return the whole text, and how many targets were missed.

    `plan` is the planner's word by the cards of a replica.
    """
    setting = record.setting
    parts = [_head(setting, record)] if setting else []
    groups = judge.grouped(record.cells)
    figures = {key: judge.figures_of(key, group) for key, group in groups.items()}
    missed = 0
    if figures:
        rows = [HEAD, *(_figures_row(each, record) for each in figures.values())]
        parts.append(f"Cells (measured part; s unless another unit is named)\n{aligned(rows)}")
        shape = setting.shape if setting else next(iter(figures)).shape
        held = [*targets.judged(groups, shape), *targets.processor_rows(figures)]
        missed += targets.missed(held)
        head = ["target", "where", "bound", "found", "verdict"]
        parts.append(f"Targets\n{aligned([head, *held])}")
    if setting and groups:
        foretold = foretell_all(record, setting, groups, plan or {})
        rows = targets.foretold_rows(groups, foretold)
        missed += targets.missed(rows)
        head = ["cell", "p50 foretold", "seen", "p99 foretold", "seen", "hit", "seen", "ratio", ""]
        parts.append(f"The policy lab's word, and what came\n{aligned([head, *rows])}")
        if rows := planned.rows(groups, foretold, setting.shape):
            told = aligned([planned.HEAD, *rows])
            parts.append(f"Several cards a replica: the planner's word, and what came\n{told}")
    parts += _heard(record) + _events(figures, groups, record)
    parts += _failures(record)
    return "\n\n".join(parts) + "\n", missed


def _head(setting: Setting, record: Record) -> str:
    lines = [
        f"{name + ':':<10} {value}" for name, value in (setting.header | record.versions).items()
    ]
    lines.append(
        f"setting:   {setting.engine}, KV cache {setting.kv_cache_tokens:,} tokens a replica, "
        f"prompts <= {setting.input_tokens_max:,}, answers <= {setting.output_tokens_max}, "
        f"one session in {setting.sessions_share}, {setting.seconds:g} s a cell, "
        f"{setting.workers} proxy workers"
    )
    if setting.engine == "simulator":
        lines.append("a rehearsal: simulated engines, whose figures are not those of a GPU")
    for entry in record.entries:
        if isinstance(entry, Capacity):
            parts = ", ".join(f"{rate:,.0f}" for rate in entry.slices)
            lines.append(
                f"capacity:  {entry.workload} {entry.shape}: {entry.uncached_tokens_per_s:,.0f} "
                f"uncached tokens/s a replica; in {entry.seconds:.0f} s after "
                f"{entry.settled_s:.0f}: {parts}"
            )
    return "\n".join(lines)


def _figures_row(each: Figures, record: Record) -> list[str]:
    capacity = record.capacity(load.paced_by(each.key.workload), each.key.shape)
    share = each.work_tokens_per_s / capacity.uncached_tokens_per_s if capacity else math.nan
    repeats = f" x{each.repeats}" if each.repeats > 1 else ""
    return [
        f"{each.key.text}{repeats}",
        f"{each.requests}",
        f"{each.errors}",
        *(f"{value:.3f}" for value in (each.ttft_p50_s, each.ttft_p95_s, each.ttft_p99_s)),
        f"{1000 * each.tpot_p50_s:.1f} ms",
        f"{1000 * each.tpot_p99_s:.1f} ms",
        f"{each.answer_p50_s:.2f}",
        f"{each.answer_p95_s:.2f}",
        f"{each.output_tokens_per_s:.0f}",
        f"{each.goodput_per_s:.2f}",
        f"{each.hit:.3f}",
        f"{each.engine_hit:.3f}",
        f"{each.work_max_over_mean:.2f}",
        f"{share:.2f}",
        f"{each.router_s_per_1000:.2f}",
        f"{each.router_start_s:.1f}",
        f"{each.router_mib:.0f}",
    ]


def choice_of(setting: Setting) -> load.Choice:
    return load.Choice(
        conversation=setting.conversation,
        agents=setting.agents,
        sessions_share=setting.sessions_share,
        input_tokens_max=setting.input_tokens_max,
        output_tokens_max=setting.output_tokens_max,
    )


def foretell_all(
    record: Record,
    setting: Setting,
    groups: Mapping[CellKey, Group],
    plan: Mapping[int, Considered],
) -> dict[CellKey, Foretold]:
    """Return the lab's word for each cell in which nothing happens.

    Repeats are foretold each, and lie beside each other as the measured ones do. What the lab
    cannot read (a trace that is not here), and several cards that are not planned, are left out.
    """
    told: dict[CellKey, Foretold] = {}
    for key, group in groups.items():
        pool = _pool(record, setting, key, plan)
        if pool is None:
            continue
        flights = []
        for cell in group.cells:
            trace = load.arrivals_of(choice_of(setting), key.workload, cell.key.repeat)
            sent = load.workload_of(load.within(trace, cell.scale, cell.seconds))
            flights += lab.flights_of(sent, key.arm, cell.scale, cell.warm_s, pool)
        told[key] = lab.figures_of(flights, pool.speeds)
    return told


def _pool(
    record: Record, setting: Setting, key: CellKey, plan: Mapping[int, Considered]
) -> Pool | None:
    """Return the lab's replicas, as quick as the run's were when nothing rested; None: untold."""
    workload = load.paced_by(key.workload)
    replicas, cards = (int(word) for word in key.shape.split("x"))
    capacity = record.capacity(workload, key.shape if cards == 1 else setting.shape)
    if key.event or capacity is None:
        return None
    try:
        trace = load.arrivals_of(choice_of(setting), workload, 0)
    except TraceError:
        return None
    manners = setting.engine if setting.engine in lab.SPEEDS else "vllm"
    pool = Pool(
        replicas=int(capacity.shape.partition("x")[0]),
        cache_tokens=setting.kv_cache_tokens,
        speeds=lab.speeds_of(manners, 1.0, setting.time_scale),
        workers=setting.workers,
    )
    window = lab.Window(capacity.settled_s, capacity.settled_s + capacity.seconds)
    measured = capacity.uncached_tokens_per_s
    pool = lab.as_quick(
        load.workload_of(trace), pool, manners, setting.time_scale, measured, window
    )
    pool = msgspec.structs.replace(pool, replicas=replicas)
    return pool if cards == 1 else planned.on_cards(pool, cards, plan)


# --- what happened in some cells ----------------------------------------------------------------


def _events(
    figures: Mapping[CellKey, Figures], groups: Mapping[CellKey, Group], record: Record
) -> list[str]:
    parts = []
    happened = [key for key in figures if key.event]
    if happened:
        parts.append("\n".join(["Events", *(_event(key, figures, groups) for key in happened)]))
    if bursts := [burst for burst in record.bursts if not burst.failure]:
        rows = [["others", "TTFT p50", "p99", "errors", "n", "replicas that serve after, s"]]
        rows += [_burst_row(burst) for burst in bursts]
        parts.append(f"A burst from one awake replica\n{aligned(rows)}")
    return parts


def _heard(record: Record) -> list[str]:
    """Say of how many replicas ours knew the caches by their own events, cell by cell."""
    counts = {
        cell.key.text: cell.told["replicas_by_events"]
        for cell in record.cells
        if "replicas_by_events" in cell.told
    }
    if not counts:
        return []
    words = ", ".join(f"{name}: {count:g}" for name, count in counts.items())
    return [f"Replicas whose KV events ours heard at the end: {words}"]


def _event(
    key: CellKey, figures: Mapping[CellKey, Figures], groups: Mapping[CellKey, Group]
) -> str:
    told: dict[str, float] = {}
    for cell in groups[key].cells:
        told |= cell.told
    words = [f"{name} {value:g}" for name, value in told.items()]
    if key.event == "kill":
        words.append(_around(groups[key].rows, told.get("killed_at_s", 0.0)))
    if (seconds := told.get("offline_s")) is not None and seconds > 0:
        words.append(f"{told['offline_tokens'] / seconds:,.0f} offline tokens/s")
    calm = groups.get(key_without_event(key))
    if calm is not None:
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            ratio = judge.interval(groups[key], calm, judge.ttft(share))
            words.append(f"TTFT {name} {ratio.text if ratio else '-'} of the calm cell's")
    return f"{key.text}: {figures[key].errors} errors; " + "; ".join(words)


def key_without_event(key: CellKey) -> CellKey:
    return CellKey(workload=key.workload, load=key.load, arm=key.arm, shape=key.shape)


def _around(rows: Sequence[Row], killed_at_s: float) -> str:
    failed = [row for row in rows if row.error]
    if not failed:
        return "no request failed"
    last_s = max(row.at_s for row in failed)
    return f"the last that failed was sent {last_s - killed_at_s:.1f} s after it"


def _burst_row(burst: Burst) -> list[str]:
    during = [r for r in burst.rows if burst.began_s <= r.at_s < burst.began_s + burst.seconds]
    ttfts = [row.ttft_s for row in during if row.ttft_s is not None and not row.error]
    p50, p99 = (quantile(ttfts, share) or math.nan for share in (0.5, 0.99))
    return [
        burst.rung,
        f"{p50:.3f}",
        f"{p99:.3f}",
        str(sum(bool(row.error) for row in burst.rows)),
        str(len(during)),
        ", ".join(f"{number + 1}: {at_s:.1f}" for number, at_s in enumerate(burst.ready_s)),
    ]


def _failures(record: Record) -> list[str]:
    lines = [
        f"{cell.key.text}: {cell.failure.splitlines()[0][:200]}"
        for cell in record.cells
        if cell.failure
    ]
    lines += [
        f"burst, {burst.rung}: {burst.failure.splitlines()[0][:200]}"
        for burst in record.bursts
        if burst.failure
    ]
    return ["\n".join(["Failed", *lines])] if lines else []
