"""Jobs in a real store without a service: validated already, and what came of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from backends.offline.records import JobRecord, NewLine
from backends.offline.store import Store

OWNER, SERVICE = "tenant", "service"
CHAT = "/v1/chat/completions"


async def add_job(
    store: Store,
    count: int,
    *,
    model: str = "m",
    window_s: float = 86400.0,
    url: str = CHAT,
    body: Mapping[str, Any] | None = None,
) -> JobRecord:
    """Add a job of `count` lines, `line-0` and so on, and begin it."""
    content, lines = bytearray(), []
    for number in range(count):
        messages = [{"role": "user", "content": f"line {number}"}]
        octets = json.dumps({"model": model, "messages": messages, **(body or {})}).encode()
        lines.append(
            NewLine(
                number=number,
                custom_id=f"line-{number}",
                offset=len(content),
                length=len(octets),
                sort_key=b"%08d" % number,
                tokens=20,
            )
        )
        content += octets + b"\n"
    file = await store.create_file(OWNER, "lines.jsonl", "batch")
    await store.append_file(file.id, bytes(content))
    await store.finish_file(file.id)
    job = await store.create_job(OWNER, file.id, url, window_s=window_s)
    claimed = await store.claim_validation(SERVICE)
    assert claimed is not None
    await store.add_lines(SERVICE, job.id, lines)
    await store.begin_job(SERVICE, job.id, model)
    return await store.job(OWNER, job.id)


async def outcomes(store: Store, job_id: str) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Return how often each custom id has a result, and all results."""
    found: list[dict[str, Any]] = []
    after = 0
    while True:
        page = await store.results(OWNER, job_id, after=after, limit=1000)
        if not page:
            return Counter(each["custom_id"] for each in found), found
        for record in page:
            found.append(json.loads(record.content))
            after = max(after, record.sequence)
