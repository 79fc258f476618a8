"""The same requests against a fresh Doherty for each policy, and the figures side by side.

Repeats are interleaved, so that what else the machine does meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from loadtest.fleet import MODEL, FleetOptions, fleet
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
            runs[policy].append(run)
            if run.interrupted:
                return {name: made for name, made in runs.items() if made}
    return runs
