"""What a pool asks of the other parts of the file, and whether these give it."""

from __future__ import annotations

from proxy.config_manager import ManagerConfig
from proxy.config_models import PoolConfig
from proxy.config_offline import OfflineConfig


def image_of(pool: PoolConfig, manager: ManagerConfig) -> str:
    """Return the image that its containers are made of; empty where they are processes."""
    if manager.provider != "docker":
        return ""
    return pool.image or manager.docker.images.get(pool.engine, "")


def check_pool(
    model: str, pool: PoolConfig, manager: ManagerConfig, offline: OfflineConfig
) -> None:
    """Refuse a pool of `model` that contradicts what is said of managers and jobs."""
    if pool.serves == "jobs":
        _check_jobs(model, pool, manager, offline)
    if pool.resources and manager.provider != "ray":
        raise ValueError(
            f"model '{model}': resources are those of a Ray cluster's nodes; leave them out, "
            "or set manager.provider: ray"
        )
    if manager.provider == "docker" and not image_of(pool, manager):
        raise ValueError(
            f"model '{model}': no image for {pool.engine}; name one in "
            f"manager.docker.images.{pool.engine} or in the pool's image"
        )
    if pool.snapshot and manager.provider != "process":
        raise ValueError(
            f"model '{model}': snapshot keeps images of this machine's processes; leave it "
            "out, or set manager.provider: process"
        )


def _check_jobs(
    model: str, pool: PoolConfig, manager: ManagerConfig, offline: OfflineConfig
) -> None:
    """Refuse engine workers that would find no lines, or would break a budget unseen."""
    if not offline.enabled and offline.work_url is None:
        raise ValueError(
            f"model '{model}': engine workers get their lines from the offline service: leave "
            "offline.enabled out, or name one that runs elsewhere in offline.work_url"
        )
    away = manager.provider == "ray" and manager.ray.address != "local"
    if away and offline.work_url is None:
        raise ValueError(
            f"model '{model}': engine workers run on nodes of the cluster; say in "
            "offline.work_url under which URL these reach the offline service"
        )
    if offline.price_per_hour_max is not None and pool.gpu_price_per_hour is None:
        raise ValueError(
            f"model '{model}': offline.price_per_hour_max needs the gpu_price_per_hour of each "
            "pool with serves: jobs"
        )
