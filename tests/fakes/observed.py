"""`doherty up` with tenants, a scaled pool and jobs, under traffic, watched by a real Prometheus.

Prometheus runs by deploy/prometheus/prometheus.yml, with the addresses of this run, and looks once
a second. What it has seen is asked by its HTTP API, as Grafana does.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from backends.keys.changes import added
from backends.keys.file import change
from backends.keys.making import RANDOM_BYTES, new_key
from proxy.contract.keys import KeyRecord, KeySet
from tests.fakes.programs import CLI, ROOT, Fetched, Program, fetch, free_port, until

CONFIG = """\
proxy:
  workers: 2
  keys_path: keys.json
  usage_log: usage.jsonl
  access_log: 'off'
tenants:
  - {name: product, class: online, requests_per_min: 100000}
  - {name: research, class: semi-online, classes: [online, semi-online, offline]}
  - {name: small, class: online, requests_per_min: 2}
models:
  - name: demo
    prompt_price: 0.2
    completion_price: 0.6
    pools:
      - engine: simulator
        name: chat
        autoscale: {min: 1, max: 1}
        target_inputs: 8
        max_inputs: 8
        args: [--profile=fast, --time-scale=0.2, --dialect=sglang, --drain-poll-seconds=0.05]
      - engine: simulator
        name: more
        replicas: 1
        max_inputs: 8
        args: [--profile=fast, --time-scale=0.2, --dialect=vllm]
      - {engine: simulator, name: jobs, serves: jobs, replicas: 1, args: [--profile, fast]}
"""
TENANTS = ("product", "research", "small")
TARGETS = 6  # three services of ours, two replicas, one engine worker


class Observed:
    """Everything that runs, and where."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "doherty.yaml"
        config.write_text(CONFIG)
        made = {tenant: new_key(secrets.token_bytes(RANDOM_BYTES)) for tenant in TENANTS}
        self.keys = {tenant: key.secret for tenant, key in made.items()}
        records = [
            KeyRecord(key_id=key.key_id, digest=key.digest, tenant=tenant)
            for tenant, key in made.items()
        ]
        change(str(folder / "keys.json"), partial(_with, records))
        ports = ("--port=0", "--admin-port=0", "--manager-port=0", "--offline-port=0")
        argv = (*CLI, "up", str(config), f"--run-dir={folder / 'run'}", *ports)
        self.up = Program(argv, folder / "up.log", cwd=folder)
        self.prometheus: Program | None = None

    def start(self) -> None:
        self.url = self.up.until_said(r"Ready: (http://\S+)/v1")[1]
        self.admin_url = self.up.until_said(r"admin +(http://\S+)")[1]
        self.manager_url = self.up.until_said(r"--manager-url (http://\S+)")[1]
        log = (self.folder / "run/logs/offline.log").read_text()
        port = json.loads(next(line for line in log.splitlines() if "offline_listening" in line))
        self.offline_url = f"http://127.0.0.1:{port['port']}"
        self.prometheus_url = f"http://127.0.0.1:{free_port()}"
        self.prometheus = Program(self._command(), self.folder / "prometheus.log", cwd=self.folder)
        until(lambda: _answers(self.prometheus_url + "/-/ready"), "Prometheus")
        until(self._all_scraped, "a first look at every target")

    def _command(self) -> tuple[str, ...]:
        folder = ROOT / "deploy" / "prometheus"
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(folder / name) for name in config["rule_files"]]
        del config["alerting"]
        urls = {
            "doherty-proxy": self.admin_url,
            "doherty-manager": self.manager_url,
            "doherty-offline": self.offline_url,
        }
        for job in config["scrape_configs"]:
            if "http_sd_configs" in job:
                (found,) = job["http_sd_configs"]
                path = found["url"].partition("8002")[2]
                found |= {"url": self.manager_url + path, "refresh_interval": "1s"}
            else:
                target = urls[job["job_name"]].removeprefix("http://")
                job["static_configs"] = [{"targets": [target]}]
        (self.folder / "prometheus.json").write_text(json.dumps(config))
        return (
            "prometheus",
            f"--config.file={self.folder / 'prometheus.json'}",
            f"--storage.tsdb.path={self.folder / 'tsdb'}",
            f"--web.listen-address={self.prometheus_url.removeprefix('http://')}",
            "--log.level=warn",
        )

    def _all_scraped(self) -> bool:
        """Whether all has been looked at once: only what counts on from there has a rate."""
        return sum(int(each["value"][1]) for each in self.query("up")) == TARGETS

    def end(self) -> None:
        if self.prometheus is not None:
            self.prometheus.end()
        self.up.end()

    # --- traffic -------------------------------------------------------------------------------

    def ask(
        self, tenant: str = "product", *, words: str = "hello", model: str = "demo", **more: Any
    ) -> Fetched:
        """Send one chat request; `more` is of its body, but for `fields`, which are of its head."""
        fields = more.pop("fields", {})
        body = {"model": model, "messages": [{"role": "user", "content": words}], **more}
        headers = {"authorization": f"Bearer {self.keys[tenant]}", **fields}
        headers["content-type"] = "application/json"
        return fetch(self.url + "/v1/chat/completions", json.dumps(body).encode(), headers)

    def traffic(self, requests: int) -> list[int]:
        """Send requests of all kinds, thirty-two at a time; return their statuses."""
        usage = {"stream": True, "stream_options": {"include_usage": True}}

        def one(number: int) -> int:
            words = f"{'a shared beginning, long enough to be worth a cache. ' * 20} {number % 5}"
            tenant = ("product", "research")[number % 2]
            more: dict[str, Any] = {"max_tokens": 20, **(usage if number % 4 else {})}
            if number % 10 == 0:
                more["fields"] = {"x-slo-ttft-ms": "5000"}
            return self.ask(tenant, words=words, **more).status

        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(one, range(requests)))

    def oddities(self) -> None:
        """What is not everyday: a wrong key, an unknown model, a limit, a client that leaves."""
        assert self.ask("product", model="nobody").status == 404
        assert fetch(self.url + "/v1/models", headers={"authorization": "Bearer no"}).status == 401
        assert [self.ask("small", max_tokens=1).status for _ in range(3)] == [200, 200, 429]
        for _ in range(3):
            self.leave()

    def leave(self) -> None:
        """Ask for a long stream and go away at its first octets."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": True}
        headers = {"authorization": f"Bearer {self.keys['product']}"}
        text = json.dumps({**body, "max_tokens": 2000})
        connection.request("POST", "/v1/chat/completions", text, headers)
        assert connection.getresponse().read(1)
        connection.close()

    def start_batch(self, lines: int) -> str:
        """Upload a file of requests and make a batch of it; return its id."""
        message = {"model": "demo", "messages": [{"role": "user", "content": "count"}]}
        content = "\n".join(
            json.dumps(
                {
                    "custom_id": str(number),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {**message, "max_tokens": 4},
                }
            )
            for number in range(lines)
        )
        form = (
            '--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            '--b\r\ncontent-disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n'
            f"{content}\r\n--b--\r\n"
        )
        key = {"authorization": f"Bearer {self.keys['research']}"}
        headers = {**key, "content-type": "multipart/form-data; boundary=b"}
        uploaded = fetch(self.url + "/v1/files", form.encode(), headers)
        assert uploaded.status == 200, uploaded.text
        wanted = {
            "input_file_id": uploaded.value["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        headers = {**key, "content-type": "application/json"}
        made = fetch(self.url + "/v1/batches", json.dumps(wanted).encode(), headers)
        assert made.status == 200, made.text
        return str(made.value["id"])

    # --- what Prometheus has seen --------------------------------------------------------------

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the series that a query gives now; a query that is none fails the test."""
        answer = fetch(f"{self.prometheus_url}/api/v1/query?query={quote(expr, safe='')}")
        assert answer.status == 200, f"{expr}: {answer.text}"
        result = answer.value["data"]["result"]
        return [each for each in result if isinstance(each, dict)]

    def targets(self) -> dict[str, list[dict[str, Any]]]:
        """Return the targets that are scraped, by job."""
        found: dict[str, list[dict[str, Any]]] = {}
        answer = fetch(self.prometheus_url + "/api/v1/targets?state=active").value
        for target in answer["data"]["activeTargets"]:
            found.setdefault(target["labels"]["job"], []).append(target)
        return found


def _with(records: list[KeyRecord], keys: KeySet) -> KeySet:
    for record in records:
        keys = added(keys, record)
    return keys


def _answers(url: str) -> bool:
    try:
        return fetch(url).status == 200
    except OSError:
        return False


@contextmanager
def observed(folder: Path) -> Iterator[Observed]:
    """Run all of it as long as the block."""
    stage = Observed(folder)
    try:
        stage.start()
        yield stage
    finally:
        stage.end()
