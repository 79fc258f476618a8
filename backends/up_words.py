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


def _of_requests(model: ModelConfig) -> list[PoolConfig]:
    return [pool for pool in model.pools if pool.serves == "requests"]


def banner(plan: Plan, down: Sequence[str] = ()) -> str:
    """Return what to do with a running endpoint, ready to be pasted; models `down` are told."""
    models = plan.config.models
    names = [m.name for m in models if _of_requests(m)] or [m.name for m in models]
    model = next((name for name in names if name not in down), (*names, "MODEL")[0])
    without = f", without {', '.join(down)}" if down else ""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "stream": True,
    }
    key, auth = '"none"', ""
    if plan.proxy.api_key is not None:
        key, auth = 'os.environ["DOHERTY_API_KEY"]', ' -H "authorization: Bearer $DOHERTY_API_KEY"'
    lines = [
        "",
        f"Ready{without}: {plan.url}/v1",
        "",
        f"curl -N {plan.url}/v1/chat/completions -H 'content-type: application/json'{auth} \\",
        f"  -d '{json.dumps(body)}'",
        "",
        *(["import os"] if auth else []),
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{plan.url}/v1", api_key={key})',
        "answer = client.chat.completions.create(",
        f'    model="{model}", messages=[{{"role": "user", "content": "Say hello."}}])',
        "print(answer.choices[0].message.content)",
        "",
        f"  admin    {plan.admin_url}  (metrics, replicas)",
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
