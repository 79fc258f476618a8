"""Requests done offline, called from Python.

    from backends.offline.client import Client

    with Client("http://127.0.0.1:8000", api_key) as client:
        job = client.spawn_map({"model": "demo", "messages": [...]} for text in texts)
        print(job.id)                           # any process with the key can ask for it
        for result in job.results():            # as they come; ordered=True: as they were asked
            print(result.number, result.value())

`AsyncClient` and `agather` are the same for asyncio. All of it is HTTP: Files and Batches as OpenAI
has them, and this service's results.
"""

from __future__ import annotations

from backends.offline.client.aio import AsyncCall, AsyncClient, AsyncJob
from backends.offline.client.aio import gather as agather
from backends.offline.client.errors import (
    InputError,
    JobFailedError,
    JobProblem,
    LineFailedError,
    OfflineError,
    RefusedError,
    UnreachableError,
)
from backends.offline.client.sync import Call, Client, Job, gather
from backends.offline.client.values import LineResult, Progress

__all__ = [
    "AsyncCall",
    "AsyncClient",
    "AsyncJob",
    "Call",
    "Client",
    "InputError",
    "Job",
    "JobFailedError",
    "JobProblem",
    "LineFailedError",
    "LineResult",
    "OfflineError",
    "Progress",
    "RefusedError",
    "UnreachableError",
    "agather",
    "gather",
]
