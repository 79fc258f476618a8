"""What can be measured: a proxy that can be started, and where it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import msgspec


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rival runs."""

    folder: Path
    port: int
    spare_port: int  # for metrics or administration
    engine_ports: tuple[int, ...]
    workers: int = 1
    region_ports: tuple[int, ...] = ()  # of two regions: for clients, for peers, and one to spare

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.engine_ports]


class Rival(ABC):
    """A proxy that can be started. `hint` says how to install it."""

    hint = ""
    keys = 1  # that its clients have, one after the other
    asked_for = False  # measured only where it is named

    def __init__(self, name: str) -> None:
        self.name = name

    def installed(self) -> bool:
        return True

    def version(self) -> str:
        return ""

    @abstractmethod
    def command(self, site: Site) -> list[str]:
        """Return what starts it, after writing what it reads into the site's folder."""

    def neighbour(self, site: Site) -> list[str]:
        """Return what starts a process beside it that is not measured; empty: there is none."""
        return []
