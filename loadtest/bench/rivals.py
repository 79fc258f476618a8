"""What is measured: ours and the proxies that others would take, each at the settings it deserves.

All of them run on the core of the proxy at the same time, and only one has work; what an idle one
uses is not counted. A rival that is not installed is left out by name.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO
from venv import EnvBuilder

import msgspec
from typing_extensions import override

from loadtest.bench import bodies, settings
from loadtest.bench.ours import (
    Before,
    Configured,
    Linked,
    Ours,
    Traced,
    Watched,
    settings_of_tenants,
)
from loadtest.bench.processes import Cores, descriptors_max, family, on_cores
from loadtest.bench.rival import Rival, Site
from loadtest.run import RunError

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.1
PORTS = 6  # for clients and administration, and of a second region
UPSTREAM_KEEPALIVE = 1024  # idle connections to engines that may be kept


class NotRunningError(RunError):
    """A rival does not start, or does not answer; the text ends in its last words."""


class Nginx(Rival):
    """nginx as a pass-through: nothing buffered, connections kept on both sides."""

    hint = "apt-get install nginx-light"

    @override
    def version(self) -> str:
        return _said([str(_find("nginx")), "-v"])

    def __init__(self, name: str, *, access_log: bool) -> None:
        super().__init__(name)
        self._access_log = access_log

    @override
    def installed(self) -> bool:
        return _find("nginx") is not None

    @override
    def command(self, site: Site) -> list[str]:
        config = site.folder / "nginx.conf"
        config.write_text(nginx_config(site, access_log=self._access_log))
        return [str(_find("nginx")), "-p", str(site.folder), "-c", str(config)]


class Haproxy(Rival):
    """HAProxy of one thread, in http mode; it logs nothing by default."""

    hint = "apt-get install haproxy"

    @override
    def version(self) -> str:
        return _said([str(_find("haproxy")), "-v"])

    @override
    def installed(self) -> bool:
        return _find("haproxy") is not None

    @override
    def command(self, site: Site) -> list[str]:
        config = site.folder / "haproxy.cfg"
        config.write_text(haproxy_config(site))
        return [str(_find("haproxy")), "-db", "-f", str(config)]


class Router(Rival):
    """A router of the engines' own projects, from a virtual environment of its own."""

    def __init__(self, name: str, venv: Path, program: Sequence[str], policy: str) -> None:
        super().__init__(name)
        self.package = program[0]
        self.hint = f"{venv}/bin/pip install {self.package}"
        self._program = venv / "bin" / program[0]
        self._arguments = list(program[1:])
        self._policy = policy

    @override
    def installed(self) -> bool:
        return self._program.exists()

    @override
    def version(self) -> str:
        return _said([str(self._program.with_name("pip")), "show", self.package], lines=2)

    @override
    def command(self, site: Site) -> list[str]:
        return [
            *(str(self._program), *self._arguments, "--host", "127.0.0.1"),
            *("--port", str(site.port), "--prometheus-port", str(site.spare_port)),
            *("--policy", self._policy, "--worker-startup-check-interval", "1"),
            *("--worker-urls", *site.urls),
        ]


def all_rivals(venv: Path, before: Path | None = None) -> list[Rival]:
    """Return every rival, ours first. `before` is another checkout of ours."""
    return [
        Ours("ours"),
        Configured("ours-key", lambda site: settings.one_key(bodies.key(0))),
        Configured("ours-tenants", settings_of_tenants, keys=bodies.USERS),
        Linked("ours-regions"),
        Before("ours-before", before),
        Configured("ours-nolog", lambda _site: settings.no_log()),
        Watched("ours-watched"),
        Traced("ours-unsampled", 0.0),
        Traced("ours-tenth", 0.1),
        Traced("ours-sampled", 1.0),
        Nginx("nginx", access_log=True),
        Nginx("nginx-nolog", access_log=False),
        Haproxy("haproxy"),
        Router("sglang-cache_aware", venv, ["sglang-router", "launch"], "cache_aware"),
        Router("sglang-round_robin", venv, ["sglang-router", "launch"], "round_robin"),
        Router("vllm-consistent_hash", venv, ["vllm-router"], "consistent_hash"),
    ]


def install_routers(rivals: Sequence[Rival], venv: Path, say: Callable[[str], None]) -> None:
    """Install the routers among `rivals` that are not there into `venv`, which is made if need be.

    What pip says goes to a file; one that cannot be installed stays as it is, not installed.
    """
    routers = [rival for rival in rivals if isinstance(rival, Router) and not rival.installed()]
    if not routers:
        return
    if not (venv / "bin" / "pip").exists():
        say(f"making the virtual environment {venv}")
        EnvBuilder(with_pip=True).create(venv)
    for package in sorted({router.package for router in routers}):
        say(f"installing {package} from PyPI")
        with open(venv / f"{package}.log", "wb") as log:
            subprocess.run(
                [str(venv / "bin" / "pip"), "install", "--quiet", package],
                stdout=log,
                stderr=log,
                check=False,
            )


def nginx_config(site: Site, *, access_log: bool) -> str:
    """Return a configuration that waits for nothing; its access log is nginx's default one."""
    servers = "".join(f"    server 127.0.0.1:{port};\n" for port in site.engine_ports)
    log = f"access_log {site.folder}/access.log" if access_log else "access_log off"
    user = "user root;\n" if os.geteuid() == 0 else ""
    temporary = "".join(
        f"  {kind}_temp_path {site.folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""\
{user}daemon off;
worker_processes {site.workers};
worker_rlimit_nofile {descriptors_max()};
pid {site.folder}/nginx.pid;
error_log {site.folder}/error.log warn;
events {{ worker_connections {descriptors_max()}; }}
http {{
  {log};
{temporary}  tcp_nodelay on;
  keepalive_timeout 600s;
  keepalive_requests 1000000000;
  client_max_body_size 64m;
  upstream engines {{
{servers}    keepalive {UPSTREAM_KEEPALIVE};
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
  }}
  server {{
    listen 127.0.0.1:{site.port} backlog=4096;
    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


def haproxy_config(site: Site) -> str:
    """Return a configuration of one thread that holds no event back."""
    servers = "".join(
        f"  server engine{number} 127.0.0.1:{port}\n"
        for number, port in enumerate(site.engine_ports)
    )
    return f"""\
global
  nbthread {site.workers}
  maxconn {descriptors_max() - 1000}
  no strict-limits
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-keep-alive 600s
frontend clients
  bind 127.0.0.1:{site.port} backlog 4096
  default_backend engines
backend engines
  balance roundrobin
{servers}"""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What can be asked for an answer: a rival, or an engine itself."""

    name: str
    port: int
    pid: int = 0  # 0: no process of its own
    load_cores: frozenset[int]  # of who asks it
    keys: int = 1  # that they have

    def pids(self) -> list[int]:
        return family(self.pid) if self.pid else []


@contextlib.contextmanager
def running(
    rival: Rival, folder: Path, engine_ports: Sequence[int], cores: Cores, workers: int
) -> Iterator[Running]:
    """A started rival that answers; stopped at the end."""
    folder.mkdir(parents=True)
    port, spare_port, *others = _free_ports()
    site = Site(
        folder=folder,
        port=port,
        spare_port=spare_port,
        engine_ports=tuple(engine_ports),
        workers=workers,
        region_ports=(port, *others),
    )
    command, neighbour = rival.command(site), rival.neighbour(site)
    with (
        open(folder / "stdout.log", "wb") as output,
        open(folder / "stderr.log", "wb") as errors,
        contextlib.ExitStack() as stack,
        _start(command, cores.proxy, output, errors) as process,
    ):
        try:
            if neighbour:
                beside = stack.enter_context(_start(neighbour, cores.proxy, output, errors))
                stack.callback(_stop, beside)
            _until_it_answers(rival.name, process, site)
            yield Running(
                name=rival.name,
                port=port,
                pid=process.pid,
                load_cores=cores.load,
                keys=rival.keys,
            )
        finally:
            _stop(process)


def _start(
    command: list[str], cores: frozenset[int], output: IO[bytes], errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    with on_cores(cores):
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _until_it_answers(name: str, process: subprocess.Popen[bytes], site: Site) -> None:
    """Wait for an engine's answer to a request of the benchmark's kind. Raises `RunError`."""
    content = bodies.body(0, 200, stream=False)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise NotRunningError(
                f"{name} ended with {process.returncode}: {_last_words(site.folder)}"
            )
        status, answer = _post(site.port, content)
        if status == 200 and b"engine-" in answer:
            return
        if time.monotonic() > deadline_s:
            raise NotRunningError(
                f"{name} does not answer (status {status or 'none'}): {_last_words(site.folder)}"
            )
        time.sleep(POLL_INTERVAL_S)


def _post(port: int, content: bytes) -> tuple[int, bytes]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_TIMEOUT_S)
    with contextlib.closing(client):
        try:
            fields = {
                "content-type": "application/json",
                "authorization": f"Bearer {bodies.key(0)}",
            }
            client.request("POST", "/v1/chat/completions", content, fields)
            answer = client.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def _last_words(folder: Path) -> str:
    logs = ("stderr.log", "stdout.log", "error.log")
    said = [(folder / log).read_text("utf-8", "replace") for log in logs if (folder / log).exists()]
    return "\n".join(said).strip()[-2000:] or "it said nothing"


def _free_ports() -> list[int]:
    """Return ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(PORTS)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _find(program: str) -> str | None:
    """Return the path of a server program; those are often outside of a user's path."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")


def _said(command: list[str], lines: int = 1) -> str:
    """Return the first lines that `command` prints, on whichever stream."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return " ".join(done.stdout.splitlines()[:lines])
