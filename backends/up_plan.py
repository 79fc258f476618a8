"""What `doherty up` is to run: settled as a whole before anything is started.

Ports that were left open are chosen here, and all are checked. Keys go to the processes by their
environment, because argument lists are public.
"""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from backends.failure import StartError
from backends.offline.setting import locked_out
from backends.ports import PortLeases, bind_problem
from backends.service import Command, environment, flags_of
from proxy.config import Config, ConfigError, ManagerConfig, OfflineConfig, ProxyConfig
from proxy.config_policy import shared_key
from proxy.contract.key_file import KeyFileError, read_key_file

SECRETS = ("api_key", "admin_api_key", "peer_key", "internal_key")
SOCKET_PATH_BYTES_MAX = 90  # 107 (unix(7)), less what the proxy adds until it has its name
ACCESS_LOG_NAME = "access.log"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is settled before anything is started."""

    config_path: str | None
    config: Config
    proxy: ProxyConfig  # effective
    proxy_flags: dict[str, object]  # those given to `up`, and those that it decides
    manager: ManagerConfig  # effective
    offline: OfflineConfig  # effective

    @property
    def serves_jobs(self) -> bool:
        """Whether it starts an offline service of its own."""
        return self.offline.enabled and self.proxy.offline_url is None

    @property
    def locked_out(self) -> str | None:
        """Why the offline service cannot send lines through the proxy, in words."""
        return locked_out(self.offline, self.proxy) if self.serves_jobs else None

    @property
    def keyed(self) -> bool:
        """Whether requests come with keys or tokens of tenants."""
        return keyed(self.config, self.proxy, self.manager)

    @property
    def keys_path(self) -> str | None:
        return self.manager.keys_path or self.proxy.keys_path

    def about_keys(self) -> str | None:
        """What is unusual about the keys, and what to do, in words.

        Raises `ConfigError` when proxy or manager would not start on the file.
        """
        path = self.keys_path
        if path is None:
            return None
        if os.path.exists(path):
            try:
                return shared_key(read_key_file(path).keys, self.proxy.api_key) or None
            except KeyFileError as error:
                raise ConfigError(f"keys_path: {error}") from error
        tenants = self.config.tenants
        tenant = tenants[0].name if tenants else "TENANT"
        where = f"--config {self.config_path}" if self.config_path else f"--keys {path}"
        return f"no API keys yet: doherty keys create --tenant {tenant} {where}"

    @property
    def run_folder(self) -> Path:
        return Path(self.manager.run_dir)

    @property
    def logs(self) -> Path:
        return self.run_folder / "logs"

    @property
    def own_logs(self) -> tuple[Path, ...]:
        """The logs that nobody else keeps bounded; an access log of the user's choice is theirs."""
        names = ("manager.log", "offline.log", "proxy.log", ACCESS_LOG_NAME)
        return tuple(self.logs / name for name in names)

    @property
    def url(self) -> str:
        url = _url(self.proxy.host, self.proxy.port)
        return url.replace("http:", "https:", 1) if self.proxy.tls_cert_path else url

    @property
    def manager_url(self) -> str:
        return _url(self.manager.host, self.manager.port)

    @property
    def admin_url(self) -> str:
        return _url(self.proxy.admin_host, self.proxy.admin_port)

    @property
    def offline_url(self) -> str:
        return _url(self.offline.host, self.offline.port)


def keyed(config: Config, proxy: ProxyConfig, manager: ManagerConfig) -> bool:
    """Say whether requests come with keys or tokens of tenants."""
    kept = proxy.keys_path or manager.keys_path or manager.keys_follow
    return bool(kept or config.tenants or config.jwt)


def with_ports(plan: Plan) -> Plan:
    """Choose the ports that were left open, and check all. Raises `StartError`."""
    leases = PortLeases(random.Random())  # noqa: S311  # spreads, hides nothing
    proxy, manager = plan.proxy, plan.manager
    proxy = msgspec.structs.replace(
        proxy,
        port=proxy.port or leases.lease(),
        admin_port=proxy.admin_port or leases.lease(),
    )
    manager = msgspec.structs.replace(manager, port=manager.port or leases.lease())
    offline = msgspec.structs.replace(plan.offline, port=plan.offline.port or leases.lease())
    listeners = [
        (proxy.host, proxy.port, "--port"),
        (proxy.admin_host, proxy.admin_port, "--admin-port"),
        (manager.host, manager.port, "--manager-port"),
    ]
    proxy_flags = plan.proxy_flags | {"port": proxy.port, "admin_port": proxy.admin_port}
    if plan.serves_jobs:
        listeners.append((offline.host, offline.port, "--offline-port"))
        proxy_flags["offline_url"] = _url(offline.host, offline.port)
    for host, port, flag in listeners:
        problem = bind_problem(host, port)
        if problem is not None:
            raise StartError(_port_problem(host, port, flag, problem))
    if len({port for _, port, _ in listeners}) < len(listeners):
        flags = ", ".join(flag for _, _, flag in listeners)
        raise StartError(f"two of {flags} are the same port; each process needs its own")
    return msgspec.structs.replace(
        plan, proxy=proxy, manager=manager, offline=offline, proxy_flags=proxy_flags
    )


def _port_problem(host: str, port: int, flag: str, problem: OSError) -> str:
    if problem.errno != errno.EADDRINUSE:
        return f"port {port} on {host} cannot be used: {problem.strerror or problem}"
    return f"port {port} on {host} is in use; stop what listens there or choose another with {flag}"


def upgrade_socket(plan: Plan) -> str | None:
    """Return where the proxy can be taken over from."""
    if plan.proxy.upgrade_socket is not None:
        return plan.proxy.upgrade_socket
    path = str(plan.run_folder / "proxy.sock")
    return path if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else None


class Commands(msgspec.Struct, frozen=True):
    """The processes of one run, in the order in which they are needed."""

    manager: Command
    offline: Command | None
    proxy: Command


def services(plan: Plan, environ: Mapping[str, str]) -> Commands:
    """Return the commands that `plan` comes to."""
    config = ("--config", plan.config_path) if plan.config_path else ()
    cli = (sys.executable, "-m", "backends.cli")
    manager_flags = {
        "host": plan.manager.host,
        "port": plan.manager.port,
        "run_dir": plan.manager.run_dir,
    }
    plain = {k: v for k, v in plan.proxy_flags.items() if k not in SECRETS}
    # From whoever serves there: who was upgraded behind our back has left a successor.
    takes_over: tuple[str, ...] = ()
    if (path := upgrade_socket(plan)) is not None:
        plain["upgrade_socket"] = path
        takes_over = ("--takeover",)
    secrets = {f"DOHERTY_{k.upper()}": str(v) for k, v in plan.proxy_flags.items() if k in SECRETS}
    # Where the desk is, for the manager as well: it starts the workers that ask there.
    told = {"DOHERTY_OFFLINE_PORT": str(plan.offline.port)} if plan.serves_jobs else {}
    for name in ("enable_trace", "otlp_traces_endpoint"):  # it sends traces, and so do its engines
        if name in plan.proxy_flags:
            told[f"DOHERTY_{name.upper()}"] = str(plan.proxy_flags[name])
    told |= {k: v for k, v in secrets.items() if k.endswith("PEER_KEY")}
    if plan.manager.keys_follow is None and (path := plan.keys_path) is not None:
        told["DOHERTY_KEYS_PATH"] = path  # it serves the keys that the proxy reads
    manager = Command(
        "manager",
        (*cli, "manager", *config, *flags_of(manager_flags)),
        environment(environ, told),
        plan.logs / "manager.log",
    )
    offline = Command(
        "offline service",
        (
            *(*cli, "offline", *config[1:], f"--port={plan.offline.port}"),
            *(f"--run-dir={plan.manager.run_dir}", f"--manager-url={plan.manager_url}"),
            *([] if plan.locked_out else [f"--proxy-url={plan.url}"]),
        ),
        environment(environ, secrets),
        plan.logs / "offline.log",
    )
    proxy = Command(
        "proxy",
        (
            *(sys.executable, "-m", "proxy", *config),
            *("--manager-url", plan.manager_url, *flags_of(plain), *takes_over),
        ),
        environment(environ, secrets),
        plan.logs / "proxy.log",
    )
    return Commands(manager, offline if plan.serves_jobs else None, proxy)


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
