"""What the fleet is told of a replica: what its keeper, its turns and its engine know, in one."""

from __future__ import annotations

import msgspec

from backends.journal import Launch
from backends.lifecycle import PUBLISHED, SERVING, SLEEPING, Lifecycle
from backends.providers.base import Process
from backends.questions import Questions
from backends.turns import Turns
from proxy.contract import ReplicaRecord


def record_of(
    questions: Questions,
    state: Lifecycle,
    turns: Turns,
    launch: Launch | None,
    *,
    url: str,
    region: str,
    engine: str,
    process: Process | None,
) -> ReplicaRecord:
    """Return the record of the replica that `questions` are asked of."""
    serving, spec = state.phase in SERVING, questions.spec
    events, replay, topic = (launch and launch.kv_source) or ("", "", "")
    return msgspec.structs.replace(
        questions.told,
        url=url,
        models=questions.models,
        pool=spec.pool,
        region=region,
        engine=engine,
        state=PUBLISHED[state.phase],
        held=state.held,
        reason=(process.waits if process else "") or state.reason,
        target_inputs=spec.target_inputs,
        max_inputs=spec.max_inputs,
        weight=spec.weight,
        restarts=state.restarts,
        pid=process.pid if process else 0,
        load=questions.load if serving else None,
        asleep=(questions.told.asleep and serving) or state.phase in SLEEPING,
        sleep_s=turns.down_s,
        wake_s=turns.up_s,
        engine_version=launch.engine_version if launch else "",
        gpus=turns.gpus if launch else (),
        kv_events=events,
        kv_replay=replay,
        kv_topic=topic,
        rid_header=launch is not None and launch.rid_header,
        priority_fields=launch.priority_fields if launch else (),
    )
