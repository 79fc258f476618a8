"""A card is taken away under load, from real engines behind a real manager and a real proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.load import Load
from tests.fakes.programs import CLI, Program, fetch, until

IN_S = 20.0  # longer than a start takes on a machine that does much else
CARDS = {"DOHERTY_GPUS": "0,1,2"}


class Region:
    """`doherty up` with two replicas on two of three cards."""

    def __init__(self, folder: Path, **pool: Any) -> None:
        # A token in 10 ms: streams last a third of a second, so that some are under way always.
        args = ["--profile", "fast", "--time-scale", "0.1"]
        usual = {"engine": "simulator", "gpus": 1, "replicas": 2, "args": args}
        pools = [usual | {"stop_grace_secs": 3} | pool]
        config = {
            "proxy": {"workers": 1, "access_log": "off"},
            "manager": {"scrape_interval_secs": 0.2},
            "models": [{"name": "demo", "pools": pools}],
        }
        path = folder / "doherty.yaml"
        path.write_text(json.dumps(config))
        ports = ("--port=0", "--admin-port=0", "--manager-port=0", f"--run-dir={folder}/run")
        self.up = Program((*CLI, "up", str(path), *ports), folder / "up.log", env=CARDS)

    def start(self) -> None:
        self.url = self.up.until_said(r"Ready: (http://\S+)/v1")[1]
        self.manager_url = self.up.until_said(r"--manager-url (http://\S+)")[1]
        until(lambda: self.serving() == {"demo-0": ["0"], "demo-1": ["1"]}, "both serve")

    def serving(self) -> dict[str, list[str]]:
        """Return the cards of those who serve."""
        replicas = fetch(self.manager_url + "/v1/fleet").value["replicas"]
        return {
            replica["replica_id"]: replica.get("gpus", [])
            for replica in replicas
            if "state" not in replica and not replica.get("asleep")
        }

    def replica_ids(self) -> set[str]:
        return {r["replica_id"] for r in fetch(self.manager_url + "/v1/fleet").value["replicas"]}

    def pid_of(self, replica_id: str) -> int:
        return int(fetch(f"{self.manager_url}/v1/replicas/{replica_id}").value["pid"])

    def reclaim(self, query: str) -> dict[str, Any]:
        return dict(fetch(f"{self.manager_url}/v1/reclaim?{query}", b"").value)


@contextmanager
def region(folder: Path, **pool: Any) -> Iterator[Region]:
    one = Region(folder, **pool)
    try:
        one.start()
        yield one
    finally:
        one.up.end()


async def test_a_card_that_goes_takes_no_request_with_it_and_then_all_go(tmp_path: Path) -> None:
    with region(tmp_path) as one:
        async with Load(one.url, clients=6) as load:
            await load.until_streaming(4)
            told = one.reclaim(f"in_s={IN_S}&gpus=0")
            assert told["notices"][0]["gpus"] == ["0"]
            await load.until(lambda: one.serving().get("demo-2") == ["2"], "the stand-in serves")
            await load.until(lambda: "demo-0" not in one.replica_ids(), "it is gone")
            assert fetch(f"{one.manager_url}/v1/reclaim").value["notices"][0]["ends_in_s"] > 0
            await load.until_more(20)
            await load.stop()
        assert load.failed() == [], load.summary()
        assert one.serving() == {"demo-1": ["1"], "demo-2": ["2"]}

        one.reclaim("in_s=6")  # and now all of the machine
        until(lambda: not one.replica_ids(), "all are gone")
        log = (tmp_path / "run/logs/manager.log").read_text()
        assert log.count('"event":"replica_spawned"') == 3, "nobody stands in for these"
        assert log.count('"event":"replica_draining"') == 3


async def test_one_that_may_sleep_is_moved_as_it_is(tmp_path: Path) -> None:
    with region(tmp_path, sleep=True) as one:
        pid = one.pid_of("demo-0")
        async with Load(one.url, clients=6) as load:
            await load.until_streaming(4)
            one.reclaim("in_s=60&gpus=0")
            await load.until(lambda: one.serving().get("demo-0") == ["2"], "it is moved")
            await load.until_more(20)
            await load.stop()
        assert load.failed() == [], load.summary()
        assert one.pid_of("demo-0") == pid
