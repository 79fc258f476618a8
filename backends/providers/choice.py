"""Which provider the configuration names, and what that means for who uses it.

The library of one that is not used is not asked for.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from backends.cards import Cards
from backends.cluster_cards import places
from backends.engines.base import EVERYWHERE
from backends.failure import StartError
from backends.gpus import GpuLeases
from backends.journal import Journal
from backends.log import Log
from backends.nvidia_smi import NONE
from backends.ports import PortLeases
from backends.providers.base import Provider
from backends.providers.process import ProcessProvider
from backends.providers.ray import RayProvider, ray_provider
from proxy.config import Config, ManagerConfig
from proxy.contract.extras import install_command


@asynccontextmanager
async def open_provider(config: Config, journal: Journal, log: Log) -> AsyncIterator[Provider]:
    """Yield what starts engines. Raises `StartError`."""
    settings, run_folder = config.manager, Path(config.manager.run_dir)
    if settings.provider == "process":
        yield ProcessProvider()
        return
    if settings.provider == "ray":
        cluster = settings.ray, config.region
        async with ray_provider(*cluster, run_folder, journal, log) as on_ray:
            yield on_ray
        return
    try:
        from backends.providers.docker import docker_provider  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        raise StartError(
            f"provider docker needs the Python package {error.name}; "
            f"install it with: {install_command('docker')}"
        ) from error
    async with docker_provider(settings.docker, run_folder, journal, log) as provider:
        yield provider


def port_leases(settings: ManagerConfig) -> PortLeases:
    """Return the ports that engines get: of this machine, or of any machine of a cluster."""
    seed = random.Random()  # noqa: S311  # spreads, hides nothing
    if settings.provider != "ray":
        return PortLeases(seed)
    return PortLeases(seed, settings.ray.port_min, settings.ray.port_max, EVERYWHERE)


def warms(settings: ManagerConfig) -> bool:
    """Say whether what engines read is to be in this machine's memory before they read it."""
    return settings.warm_page_cache and settings.provider != "ray"


def cluster_cards(provider: Provider, settings: ManagerConfig, log: Log) -> Cards | None:
    """Return the GPUs of a cluster, as they come and go; None: those of this machine are meant."""
    if not isinstance(provider, RayProvider) or settings.cards == NONE:
        return None
    leases = GpuLeases(places(provider.nodes, ()))
    cards = Cards(leases, log)

    def renew() -> None:
        held = {device for devices in leases.holders.values() for device in devices}
        cards.renew(places(provider.nodes, held))

    provider.on_nodes = renew
    return cards
