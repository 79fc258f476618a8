"""A proxy in each of two regions, as processes, and a wire for what one sends to the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import orjson

from tests.fakes.engine import free_port
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.regions import Wire

WORKERS = 2
LEFT_S = 10.0  # a broken test must end


@contextlib.asynccontextmanager
async def regions(
    folder: Path, eu_engine: str, us_engine: str
) -> AsyncIterator[tuple[ProxyProcess, ProxyProcess, Wire]]:
    """Run a proxy in each of two regions, with a wire for what eu sends to us."""
    ports = [await free_port() for _ in range(4)]
    eu_port, us_port, eu_peer, us_peer = ports
    async with Wire(us_port) as wire:
        urls = {"eu": f"http://127.0.0.1:{eu_port}", "us": f"http://127.0.0.1:{wire.port}"}
        peers = {"eu": f"127.0.0.1:{eu_peer}", "us": f"127.0.0.1:{us_peer}"}
        paths = {}
        for region, other in (("eu", "us"), ("us", "eu")):
            remote = {"region": other, "url": urls[other], "peer": peers[other]}
            proxy = {"peer_listen": peers[region], "peer_key": "key-of-all", "workers": WORKERS}
            config = {"region": region, "proxy": proxy, "remote_regions": [remote]}
            paths[region] = folder / f"{region}.yaml"
            paths[region].write_bytes(orjson.dumps(config))
        us = ProxyProcess(
            *("--config", str(paths["us"]), "--port", str(us_port), "--worker-urls", us_engine)
        )
        eu = ProxyProcess(
            *("--config", str(paths["eu"]), "--port", str(eu_port), "--worker-urls", eu_engine)
        )
        async with us, eu:
            for proxy in (us, eu):
                await proxy.until_said(r"#0 is linked")
            yield eu, us, wire


async def counted(proxy: ProxyProcess, name: str, at_least: float, **labels: str) -> None:
    async with asyncio.timeout(LEFT_S):
        while await proxy.metric(name, **labels) < at_least:
            await asyncio.sleep(0.05)
