"""What may happen during a cell: an engine is killed, or offline work fills what is left.

*kill*: one engine ends by SIGKILL, with all it started, after two fifths of the cell, and does not
come back. The router has to find out by itself. *backfill*: as many offline requests as are wanted
are always under way through the same router; ours knows their class by the header.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Final

import orjson

from loadtest.client import Client, RequestError, parse_url
from loadtest.gpu.direct import MODEL
from loadtest.words import WORDS

if TYPE_CHECKING:
    from loadtest.gpu.fleet.cell import Place
    from loadtest.gpu.fleet.rivals import Running

KILL_AFTER_SHARE: Final = 0.4
BACKFILL_AT_ONCE: Final = 96
BACKFILL_PROMPT_TOKENS, BACKFILL_OUTPUT_TOKENS = 1500, 128
OFFLINE: Final = "x-doherty-class: offline\r\n"
PAUSE_S = 0.2  # after a refusal


async def happen(event: str, router: Running, place: Place, told: dict[str, float]) -> None:
    """Do it, and note in `told` what came of it; cancelled when the cell ends."""
    if event == "kill":
        await asyncio.sleep(KILL_AFTER_SHARE * place.seconds)
        victim = place.fleet.engines[-1]
        told["killed_at_s"] = round(KILL_AFTER_SHARE * place.seconds, 2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)
    elif event == "backfill":
        await _backfill(router, told)


async def _backfill(router: Running, told: dict[str, float]) -> None:
    client = Client(parse_url(router.url), time.monotonic)
    told |= {"offline_requests": 0, "offline_tokens": 0, "offline_refused": 0}
    begun_s = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(BACKFILL_AT_ONCE):
                group.create_task(_offline(client, random.Random(number), told))
    finally:
        told["offline_s"] = round(time.monotonic() - begun_s, 2)
        client.close()


async def _offline(client: Client, draw: random.Random, told: dict[str, float]) -> None:
    while True:
        prompt = " ".join(draw.choices(WORDS, k=BACKFILL_PROMPT_TOKENS))
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": BACKFILL_OUTPUT_TOKENS,
            "ignore_eos": True,
        }
        try:
            answer = await client.post("/v1/completions", orjson.dumps(body), OFFLINE)
        except RequestError:
            answer = None
        if answer is not None and answer.status == 200:
            told["offline_requests"] += 1
            told["offline_tokens"] += BACKFILL_PROMPT_TOKENS + BACKFILL_OUTPUT_TOKENS
        else:
            told["offline_refused"] += 1
            await asyncio.sleep(PAUSE_S)
