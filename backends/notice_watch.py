"""Looks again and again at the place where a cloud, or a file, says that the machine will go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import msgspec

from backends.clock import Clock
from backends.log import Log
from backends.notice_words import Ask, ask_of, read_notice
from backends.notices import Reclaims, RefusedNoticeError
from proxy.config import ReclaimNoticeConfig
from proxy.contract.bodies import whole_body

ANSWER_S_MAX = 2.0
BYTES_MAX = 64 * 1024
_TOKEN_TTL = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
_TOKEN = "X-aws-ec2-metadata-token"  # noqa: S105  # the name of a header

_TROUBLE = (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.MsgspecError)


async def watch_notice(
    config: ReclaimNoticeConfig, reclaims: Reclaims, clock: Clock, log: Log
) -> None:
    """Look until cancelled; what cannot be read is told once, and looked at again."""
    trouble = ""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            try:
                await _look(config, session, reclaims, clock)
                trouble = ""
            except (*_TROUBLE, RefusedNoticeError) as error:
                text = str(error) or type(error).__name__
                if text != trouble:
                    log.caution("reclaim_notice_unread", kind=config.kind, error=text)
                trouble = text
            await asyncio.sleep(config.poll_secs)


async def _look(
    config: ReclaimNoticeConfig, session: aiohttp.ClientSession, reclaims: Reclaims, clock: Clock
) -> None:
    ask, name = ask_of(config), ""
    body = await _read_file(ask.url) if config.kind == "file" else await _get(session, ask)
    if body is None:
        return
    if ask.name_url:
        named = await _get(session, Ask(ask.name_url, ask.headers))
        name = (named or b"").decode("utf-8", "replace").strip()
    told = read_notice(config.kind, body, name, clock.unix_s())
    if told is not None:
        in_s = max(0.0, told.ends_unix_s - clock.unix_s())
        reclaims.take(in_s, told.gpus or None, config.kind)


async def _read_file(path: str) -> bytes | None:
    try:
        return await asyncio.to_thread(Path(path).read_bytes)
    except FileNotFoundError:
        return None


async def _get(session: aiohttp.ClientSession, ask: Ask) -> bytes | None:
    """Return what stands there; None: nothing (404)."""
    headers = dict(ask.headers)
    if ask.token_url:
        async with session.put(ask.token_url, headers=_TOKEN_TTL) as response:
            if response.status == 200:  # otherwise it is a machine that wants none
                headers[_TOKEN] = (await whole_body(response, BYTES_MAX)).decode("ascii", "ignore")
    async with session.get(ask.url, headers=headers) as response:
        if response.status == 404:
            return None
        if response.status != 200:
            raise ValueError(f"{ask.url} answers with status {response.status}")
        return await whole_body(response, BYTES_MAX)
