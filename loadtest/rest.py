"""What a proxy still holds when nobody asks it anything any more: nothing, if it kept count.

A lease that is never released makes its replica look busier for good; a request that waits for a
replica after its client has gone takes one from somebody else. Both show here and nowhere else.
"""

from __future__ import annotations

import asyncio
import time

from loadtest.client import Client
from loadtest.fleet import get, local
from loadtest.run import RunError
from loadtest.storm.stage import read_metrics

HELD = ("leases", "leases_of_others", "queue_depth", "requests_in_flight", "replica_queued_tokens")
REST_TIMEOUT_S = 15.0  # notes, and ends that clients have already seen, are on their way
POLL_INTERVAL_S = 0.1


async def left_over(admin_port: int) -> dict[str, float]:
    """Wait until the proxy holds nothing, or for long enough; return what it holds.

    Raises `RunError` when it does not say.
    """
    client = Client(local(admin_port), time.monotonic)
    deadline_s = time.monotonic() + REST_TIMEOUT_S
    try:
        while True:
            status, page = await get(client, "/metrics")
            metrics = read_metrics(page.decode())
            missing = [name for name in HELD if name not in metrics]
            if status != 200 or missing:
                raise RunError(f"/metrics answered {status}, without {', '.join(missing)}")
            left = {name: metrics[name] for name in HELD if metrics[name]}
            if not left or time.monotonic() > deadline_s:
                return left
            await asyncio.sleep(POLL_INTERVAL_S)
    finally:
        client.close()
