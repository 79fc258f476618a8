"""What `doherty up` says: of replicas as they come up, and lines that work when they are pasted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from backends.up_plan import Plan
from proxy.config import Config, ModelConfig, PoolConfig
from proxy.contract import ReplicaRecord, ReplicaState


def describe(replica: ReplicaRecord) -> str:
    """Return the line that tells of a replica's state; empty where there is nothing to tell yet."""
    match replica.state:
        case ReplicaState.READY if replica.asleep:
            return f"  {replica.replica_id}: {replica.reason}"
        case ReplicaState.READY:
            again = f", restart {replica.restarts}" if replica.restarts else ""
            engine = f"{replica.engine} {replica.engine_version}".rstrip()
            return f"  {replica.replica_id} is ready ({engine}, {replica.url}{again})"
        case ReplicaState.BACKOFF:
            return f"  {replica.replica_id} waits to start again: {replica.reason}"
        case ReplicaState.STARTING if not replica.restarts:
            return f"  {replica.replica_id} is starting"
        case _:
            return ""


def models_down(config: Config, replicas: Iterable[ReplicaRecord]) -> tuple[str, ...]:
    """Return the configured models that no replica serves now, nor will when one is asked for."""
    able = [r for r in replicas if r.state is ReplicaState.READY and not r.asleep]
    served = {name for replica in able for name in replica.models}
    wakes = {m.name for m in config.models if any(p.autoscale for p in _of_requests(m))}
    down = {m.name for m in config.models if _of_requests(m)} - served - wakes
    return tuple(model.name for model in config.models if model.name in down)


def banner(plan: Plan, down: Sequence[str] = ()) -> str:
    """Return what to do with a running endpoint, ready to be pasted; models `down` are told."""
    without = f", without {', '.join(down)}" if down else ""
    key, auth = '"none"', ""
    if plan.proxy.api_key is not None or plan.keyed:
        key, auth = 'os.environ["DOHERTY_API_KEY"]', ' -H "authorization: Bearer $DOHERTY_API_KEY"'
    client = [
        *(["import os"] if auth else []),
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{plan.url}/v1", api_key={key})',
    ]
    names = [model.name for model in plan.config.models if _of_requests(model)]
    model = next((name for name in names if name not in down), (*names, "MODEL")[0])
    lines = _a_request(plan.url, model, auth, client) if names else [*client, *_A_JOB]
    lines = [
        *("", f"Ready{without}: {plan.url}/v1", ""),
        *lines,
        "",
        f"  admin    {plan.admin_url}  (dashboard, metrics)",
        f"  replicas doherty status --manager-url {plan.manager_url}",
        f"  logs     {plan.logs}",
        *(
            [f"  batches  {plan.url}/v1/batches  (files: {plan.url}/v1/files)"]
            if plan.serves_jobs
            else []
        ),
        "  stop     Ctrl-C (twice to hurry)",
        "",
    ]
    return "\n".join(lines)


def takes_requests(config: Config) -> bool:
    """Say whether any model is served to whoever asks; else there are jobs only."""
    return any(_of_requests(model) for model in config.models)


def _of_requests(model: ModelConfig) -> list[PoolConfig]:
    return [pool for pool in model.pools if pool.serves == "requests"]


def _a_request(url: str, model: str, auth: str, client: Sequence[str]) -> list[str]:
    message = {"role": "user", "content": "Say hello."}
    body = {"model": model, "messages": [message], "stream": True}
    return [
        f"curl -N {url}/v1/chat/completions -H 'content-type: application/json'{auth} \\",
        f"  -d '{json.dumps(body)}'",
        "",
        *client,
        "answer = client.chat.completions.create(",
        f'    model="{model}", messages=[{json.dumps(message)}])',
        "print(answer.choices[0].message.content)",
    ]


# With a file of requests, one a line, as OpenAI's batches have them.
_A_JOB = (
    'lines = client.files.create(file=open("lines.jsonl", "rb"), purpose="batch")',
    "job = client.batches.create(input_file_id=lines.id, "
    'endpoint="/v1/chat/completions", completion_window="24h")',
    "print(client.batches.retrieve(job.id).request_counts)",
)
