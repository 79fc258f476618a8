"""The same requests against a fresh Doherty for each policy, and the figures side by side.

When the last answer has come, the proxy must hold nothing any more: no lease, nothing that waits.
Repeats are interleaved, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

from loadtest.fleet import MODEL, FleetOptions, fleet
from loadtest.measure import spread
from loadtest.policies.beside import Seen
from loadtest.rest import left_over
from loadtest.run import Options, Run, run_replay
from loadtest.traces import Trace


async def compare(
    trace: Trace, replay_options: Options, options: FleetOptions, say: Callable[[str], None]
) -> dict[str, list[Run]]:
    """Return the runs of each policy. Raises `RunError` when a fleet does not come up."""
    runs: dict[str, list[Run]] = {policy: [] for policy in options.policies}
    for repeat in range(options.repeat):
        for policy in options.policies:
            name = policy if options.repeat == 1 else f"{policy} {repeat + 1}/{options.repeat}"
            say(f"{name}: starting {options.replicas} replicas")
            async with fleet(policy, options) as running:
                run = await run_replay(
                    trace,
                    msgspec.structs.replace(
                        replay_options,
                        url=f"http://127.0.0.1:{running.ports.proxy}",
                        model=MODEL,
                        label=name,
                    ),
                    replica_count=options.replicas,
                )
                run = msgspec.structs.replace(run, left=await left_over(running.ports.admin))
            runs[policy].append(run)
            if run.interrupted:
                return {name: made for name, made in runs.items() if made}
    return runs


def broken_promises(runs: dict[str, list[Run]]) -> list[str]:
    """Return a line for each policy whose proxy failed requests, or did not come to rest."""
    found = []
    for run in (run for repeats in runs.values() for run in repeats):
        failed = sum(bool(outcome.error) for outcome in run.outcomes)
        if failed and not run.interrupted:
            kinds = sorted({outcome.error for outcome in run.outcomes if outcome.error})
            found.append(f"{run.label}: {failed} requests failed: {', '.join(kinds)}")
        if run.left:
            left = ", ".join(f"{name} {value:g}" for name, value in run.left.items())
            found.append(f"{run.label}: not back to zero: {left}")
    return found


def in_engine_seconds(runs: dict[str, list[Run]], time_scale: float) -> dict[str, Seen]:
    """Return what the lab's figures are set beside: medians of the repeats."""
    return {
        policy: Seen(
            time_scale * _median(run.summary.ttft_p95_s for run in repeats),
            time_scale * _median(run.summary.tpot_p99_s for run in repeats),
            _median(run.summary.hit_rate for run in repeats),
        )
        for policy, repeats in runs.items()
    }


def _median(values: Iterable[float | None]) -> float:
    middle = spread([value for value in values if value is not None])
    return middle.median if middle else math.nan
