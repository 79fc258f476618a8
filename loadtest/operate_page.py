"""A page with the curves of a run of Locust: no script, nothing to load, some 30 kB.

Locust's own page carries its whole user interface, over a megabyte; this one can be kept beside
the table that it explains. Pure.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import msgspec

WIDTH, HEIGHT, LEFT, TOP = 900, 160, 60, 24
TITLE = "Locust's users, a replica killed, the proxy rolled"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem }
pre { font-size: 12px; overflow-x: auto; background: #f5f6f8; padding: 1rem }
svg { width: 100%; height: auto } text { font: 12px system-ui, sans-serif; fill: #5a6472 }
path { fill: none; stroke: #1f6feb; stroke-width: 1.5 } .axis { stroke: #d5d9e0; stroke-width: 1 }
.mark { stroke: #c4320a; stroke-width: 1; stroke-dasharray: 4 3 } .said { fill: #c4320a }
"""


class Second(msgspec.Struct, frozen=True, kw_only=True):
    """What Locust noted at one moment."""

    at_s: float
    requests_per_s: float
    failures_per_s: float
    ttft_p95_ms: float


def page(text: str, seconds: Sequence[Second], marks: Sequence[tuple[float, str]]) -> str:
    """Return the page: curves over time with the events marked, then the text as it is."""
    curves = (
        ("requests each second", [second.requests_per_s for second in seconds]),
        ("failures each second", [second.failures_per_s for second in seconds]),
        ("ms to the first token, p95 of the last 10 s", [s.ttft_p95_ms for s in seconds]),
    )
    times = [second.at_s for second in seconds]
    drawn = "\n".join(_curve(name, times, values, marks) for name, values in curves)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><h1>{TITLE}</h1>\n{drawn}\n"
        f"<pre>{html.escape(text)}</pre></body></html>\n"
    )


def _curve(
    name: str, times: Sequence[float], values: Sequence[float], marks: Sequence[tuple[float, str]]
) -> str:
    end_s, top = max([*times, 1.0]), max([*values, 1e-9])

    def x(at_s: float) -> float:
        return LEFT + (WIDTH - LEFT) * max(0.0, min(at_s, end_s)) / end_s

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP) * (1 - value / top)

    points = " L".join(f"{x(t):.1f} {y(v):.1f}" for t, v in zip(times, values, strict=True))
    parts = [f'<text x="0" y="12">{html.escape(name)}</text>']
    parts.append(f'<path class="axis" d="M{LEFT} {TOP} V{HEIGHT} H{WIDTH}"/>')
    top_text = f"{top:.3g}" if max(values, default=0.0) > 0 else "0"
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 6}" text-anchor="end">{top_text}</text>')
    parts.append(f'<text x="{WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{end_s:.0f} s</text>')
    for at_s, what in marks:
        parts.append(f'<path class="mark" d="M{x(at_s):.1f} {TOP} V{HEIGHT}"/>')
        said = html.escape(what.partition(",")[0])
        parts.append(f'<text class="said" x="{x(at_s) + 4:.1f}" y="{TOP - 4}">{said}</text>')
    parts.append(f'<path d="M{points}"/>' if points else "")
    label = html.escape(f"{name}: at most {top_text}", quote=True)
    frame = f'viewBox="0 0 {WIDTH} {HEIGHT + 22}" role="img" aria-label="{label}"'
    return f"<svg {frame}>{''.join(parts)}</svg>"
