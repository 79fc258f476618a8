"""What a replica yields that is kept full, and at which batch it is full.

Offline work is judged by it: by the seconds that GPUs take for a million tokens. Two sums bound
what an engine makes of prefill and decode. One after the other, nothing is saved. Mixed, chunks of
prefill use the arithmetic that decode leaves idle, and at best the shorter of the two costs
nothing. Engines lie in between, and how far is not measured: so figures are those of the first sum,
and the second is told where the two disagree about a choice.
"""

from __future__ import annotations

import msgspec

from backends.planning.floors import (
    Replica,
    batch_max,
    crossover_batch,
    first_token_s,
    token_time,
)
from backends.planning.goal import Goal, WorkClass

BATCH_MAX: dict[WorkClass, int] = {"online": 256, "semi-online": 512, "offline": 1024}


def throughput(goal: Goal, replica: Replica, batch: int, *, mixed: bool = False) -> float:
    """Return answer tokens a second of a replica that always has `batch` requests.

    `mixed`: at best, with prefill wholly hidden in decode steps or they in it.
    """
    if batch < 1:
        return 0.0
    prompts_s = batch * first_token_s(replica, goal.prompt_tokens)
    step_s = token_time(replica, batch, goal.decode_context_tokens).expected_s
    answers_s = goal.answer_tokens * step_s
    took_s = max(prompts_s, answers_s) if mixed else prompts_s + answers_s
    return batch * goal.answer_tokens / took_s


def saturating_batch(goal: Goal, replica: Replica) -> int:
    """Return the batch that keeps the arithmetic busy, or as much of it as fits."""
    wanted = min(crossover_batch(replica), BATCH_MAX[goal.work])
    return min(wanted, batch_max(replica, goal.sequence_tokens))


def drafting_yield(goal: Goal, replica: Replica, *, mixed: bool = False) -> float:
    """Return the share that the draft takes off the GPU-seconds of a full replica's tokens.

    Each is taken at its own batch, since a draft takes memory from the cache.
    """
    plain = msgspec.structs.replace(replica, draft=None)
    with_it = throughput(goal, replica, saturating_batch(goal, replica), mixed=mixed)
    without = throughput(goal, plain, saturating_batch(goal, plain), mixed=mixed)
    if not without:  # it does not fit either way, and what does not fit is told elsewhere
        return 0.0
    return 1.0 - without / with_it if with_it else -1.0
