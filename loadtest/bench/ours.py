"""Ours as it is measured: with its defaults, and with what is worth knowing the price of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import orjson
from typing_extensions import override

from loadtest.bench import bodies, settings
from loadtest.bench.rival import Rival, Site
from loadtest.bench.settings import Settings


class Ours(Rival):
    """Doherty as its flags make it by default: prefix routing, metrics, access log, limits."""

    @override
    def command(self, site: Site) -> list[str]:
        ports = ["--port", str(site.port), "--admin-port", str(site.spare_port)]
        workers = ["--workers", str(site.workers)]
        return [sys.executable, "-m", "proxy", *ports, *workers, "--worker-urls", *site.urls]


class Before(Ours):
    """Another checkout of this, in the same settings: what a change costs is the two in one run."""

    asked_for = True
    hint = "--before FOLDER says where the other checkout is"

    def __init__(self, name: str, folder: Path | None) -> None:
        super().__init__(name)
        self._folder = folder

    @override
    def installed(self) -> bool:
        return self._folder is not None and (self._folder / "proxy" / "__main__.py").is_file()

    @override
    def command(self, site: Site) -> list[str]:
        return ["env", "-C", str(self._folder), *super().command(site)]


class Configured(Ours):
    """The same with a file of settings; what that costs is measured where somebody asks for it."""

    asked_for = True

    def __init__(self, name: str, prepare: Callable[[Site], Settings], keys: int = 1) -> None:
        super().__init__(name)
        self.keys = keys
        self._prepare = prepare

    @override
    def command(self, site: Site) -> list[str]:
        path = site.folder / "doherty.json"
        path.write_bytes(orjson.dumps(self._prepare(site)))
        return [*super().command(site), "--config", str(path)]


class Linked(Configured):
    """Two regions that know of each other; the other one has no work, and is not measured."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda site: settings.region(0, site.region_ports))

    @override
    def neighbour(self, site: Site) -> list[str]:
        path = site.folder / "neighbour.json"
        path.write_bytes(orjson.dumps(settings.region(1, site.region_ports)))
        ports = ["--port", str(site.region_ports[1]), "--admin-port", str(site.region_ports[4])]
        return [
            *(sys.executable, "-m", "proxy", *ports, "--config", str(path)),
            *("--worker-urls", *site.urls),
        ]


class Traced(Configured):
    """One that records this share of the traces that begin here; a collector takes them all."""

    def __init__(self, name: str, share: float) -> None:
        super().__init__(name, lambda site: settings.traced(site.region_ports[4], share))

    @override
    def neighbour(self, site: Site) -> list[str]:
        return [sys.executable, "-m", "loadtest.bench.collector", str(site.region_ports[4])]


class Watched(Ours):
    """One whose view somebody watches, as an open dashboard does."""

    asked_for = True

    @override
    def neighbour(self, site: Site) -> list[str]:
        return [sys.executable, "-m", "loadtest.bench.watcher", str(site.spare_port)]


def settings_of_tenants(site: Site) -> Settings:
    """Return settings of many tenants, after writing the file of their keys."""
    return settings.tenants(site.folder, [bodies.key(number) for number in range(bodies.USERS)])
