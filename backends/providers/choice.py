"""Which provider the configuration names. The library of one that is not used is not asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from backends.failure import StartError
from backends.journal import Journal
from backends.log import Log
from backends.providers.base import Provider
from backends.providers.process import ProcessProvider
from proxy.config import ManagerConfig


@asynccontextmanager
async def open_provider(
    settings: ManagerConfig, journal: Journal, log: Log
) -> AsyncIterator[Provider]:
    """Yield what starts engines. Raises `StartError`."""
    if settings.provider == "process":
        yield ProcessProvider()
        return
    try:
        from backends.providers.docker import docker_provider  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        raise StartError(
            f"provider docker needs the Python package {error.name}; "
            "install it with: pip install 'doherty[docker]'"
        ) from error
    async with docker_provider(settings.docker, Path(settings.run_dir), journal, log) as provider:
        yield provider
