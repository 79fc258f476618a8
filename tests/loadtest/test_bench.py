"""What the benchmark counts, how it judges, and a quick run of it all."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from loadtest import bench
from loadtest.__main__ import main
from loadtest.bench import bodies, native, processes, rivals, settings, targets
from loadtest.bench.rival import Rival, Site
from loadtest.bench.scenarios import SCENARIOS, Scenario
from loadtest.bench.stand import DIRECT, Sample, Subject
from loadtest.run import RunError

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler `cc`")
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def found(scenario: str, rival: str, *values: float | None) -> list[Sample]:
    return [
        Sample(scenario=scenario, rival=rival, round=number, value=value)
        for number, value in enumerate(values)
    ]


# --- what is counted ----------------------------------------------------------------------------


def test_the_proxy_has_its_cores_to_itself_if_there_are_enough() -> None:
    four = processes.share_cores([3, 1, 0, 2])
    assert (four.proxy, four.engine, four.load) == ({3}, {0}, {1})
    two = processes.share_cores([0, 1])
    assert (two.proxy, two.engine, two.load) == ({1}, {0}, {0})
    shared = processes.share_cores([0, 1], proxy_cores=2)
    assert (shared.proxy, shared.engine, shared.load) == ({0, 1}, {0}, {1})
    one = processes.share_cores([5])
    assert (one.proxy, one.engine, one.load) == ({5}, {5}, {5})


def test_a_process_that_began_meanwhile_counts_whole_and_one_that_ended_is_an_error() -> None:
    assert processes.spent_ns({1: 100, 2: 50}, {1: 150, 2: 50, 3: 7}) == 57
    with pytest.raises(RunError, match="process 2 ended"):
        processes.spent_ns({1: 100, 2: 50}, {1: 150})


def test_processor_time_is_that_of_the_process_and_grows() -> None:
    pids = processes.family(processes.os.getpid())
    before = processes.processor_of(pids[:1])
    assert sum(range(200_000)) > 0
    assert processes.spent_ns(before, processes.processor_of(pids[:1])) > 0
    with pytest.raises(RunError, match="ended during a run"):
        processes.processor_ns(2**22 + 1)  # above the largest pid


def test_a_spread_is_of_the_rounds_that_have_a_figure() -> None:
    samples = found("1kb", "ours", 3.0, None, 1.0, 8.0)
    assert targets.spreads(samples, SCENARIOS) == {("1kb", "ours"): targets.Spread(3.0, 1.0, 8.0)}


def test_what_the_engine_itself_takes_is_taken_off_round_by_round() -> None:
    samples = found("ttfb", DIRECT, 100.0, 200.0) + found("ttfb", "ours", 150.0, 270.0)
    spread = targets.spreads(samples, SCENARIOS)
    assert spread["ttfb", "ours"] == targets.Spread(60.0, 50.0, 70.0)
    assert spread["ttfb", DIRECT].low == 100.0
    with_cpu = found("1kb", DIRECT, 100.0) + found("1kb", "ours", 150.0)
    assert targets.spreads(with_cpu, SCENARIOS)["1kb", "ours"].median == 150.0


# --- how it is judged ---------------------------------------------------------------------------


def judged(*samples: list[Sample]) -> dict[str, targets.Verdict]:
    spreads = targets.spreads([one for part in samples for one in part], SCENARIOS)
    return {one.target: one for one in targets.verdicts(spreads, SCENARIOS)}


def test_a_factor_is_of_the_rivals_median() -> None:
    met = judged(found("1kb", "ours", 33.0, 34.0, 90.0), found("1kb", "nginx", 20.0))
    assert list(met) == ["1 KB: <= 1.7 x nginx"]  # the rival of the other target was not measured
    assert met["1 KB: <= 1.7 x nginx"].met
    assert met["1 KB: <= 1.7 x nginx"].ratio == pytest.approx(1.7)
    missed = judged(found("1kb", "ours", 34.1), found("1kb", "nginx", 20.0))
    assert not missed["1 KB: <= 1.7 x nginx"].met


def test_a_fraction_a_sum_and_a_least_value() -> None:
    verdicts = judged(
        found("16kb", "ours", 10.0),
        found("16kb", "sglang-cache_aware", 71.0),
        found("idle", "ours", 81.0),
        found("idle", "nginx", 20.0),
        found("upload", "ours", 19.0),
        found("workers", "ours", 1.7),
    )
    assert {name: one.met for name, one in verdicts.items()} == {
        "16 KB: <= 1/7 x sglang-cache_aware": True,
        "idle clients: <= 2 x nginx + 40": False,
        "16 MB upload: <= 20": True,
        "2 workers: >= 1.8": False,
    }


def test_every_target_names_a_scenario_and_a_rival() -> None:
    names = {rival.name for rival in rivals.all_rivals(Path("/nowhere"))}
    for target in targets.TARGETS:
        assert target.scenario in BY_NAME
        assert target.rival in names | {""}
        assert BY_NAME[target.scenario].ours_only <= (target.rival == "")


def test_the_tables_say_what_was_not_measured_and_what_was_missed() -> None:
    spreads = targets.spreads(found("1kb", "ours", 40.0) + found("1kb", "nginx", 20.0), SCENARIOS)
    chosen = [BY_NAME["1kb"], BY_NAME["16kb"]]
    table = targets.figures_table(spreads, chosen, ["ours", "nginx"]).splitlines()
    assert [len(line.split()) for line in table[2:]] == [4, 4]
    assert table[2].split() == ["ours", "40.0", "[40.0-40.0]", "-"]
    rows = targets.verdicts_table(targets.verdicts(spreads, chosen)).splitlines()
    assert re.fullmatch(r"1 KB: <= 1.7 x nginx\s+40.0\s+34.0\s+2.00\s+missed", rows[1])


def test_notes_say_when_cores_are_too_few() -> None:
    notes = {"rps_of_1": 5000, "rps_of_2": 6000, "us_of_1": 30, "us_of_2": 31, "cores": 2.0}
    one = Sample(scenario="workers", rival="ours", notes=notes)
    assert "2 cores are too few" in targets.notes([one])[0]
    four = Sample(scenario="workers", rival="ours", value=1.9, notes=notes | {"cores": 4.0})
    assert "too few" not in targets.notes([four])[0]


# --- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1kb", "16kb"])
def test_bodies_have_the_size_they_are_said_to_have(name: str) -> None:
    size = bodies.SIZES[name]
    parts = [one.split(b"\r\n\r\n", 1) for one in bodies.size_requests(size, stream=True)]
    sizes = [len(content) for _, content in parts]
    assert sum(sizes) / len(sizes) == pytest.approx(size.mean_bytes, rel=0.03)
    assert max(sizes) > 2 * min(sizes)
    for head, content in parts[:20]:
        assert f"content-length: {len(content)}".encode() in head
        assert content.count(bodies.TAG.encode()) == 1


def test_conversations_share_the_beginning_of_their_group_and_end_differently() -> None:
    first, same, other = (bodies.conversation(n, 4000) for n in (0, bodies.GROUPS, 1))
    assert first[0] == same[0] != other[0]
    assert first[-1] != same[-1]
    later = bodies.conversation(4 * bodies.GROUPS, 4000)
    assert later[:3] == first[:3]
    assert later[3] != first[3]
    content = bodies.body(0, 4000, stream=True)
    assert b'\\"' in content
    assert b"\\n" in content
    assert not content.isascii()
    assert orjson.loads(content)["stream"] is True
    assert content == bodies.body(0, 4000, stream=True)


# --- rivals -------------------------------------------------------------------------------------


def site(folder: Path, workers: int = 1) -> Site:
    return Site(
        folder=folder, port=1000, spare_port=1001, engine_ports=(2000, 2001), workers=workers
    )


def test_tenants_have_the_keys_that_are_sent_and_every_limit(tmp_path: Path) -> None:
    [tenants] = [r for r in rivals.all_rivals(tmp_path) if r.name == "ours-tenants"]
    command = tenants.command(site(tmp_path))
    said = orjson.loads(Path(command[command.index("--config") + 1]).read_bytes())
    assert len(said["tenants"]) == 100
    assert all(tenant["tokens_per_min"] and tenant["max_concurrent"] for tenant in said["tenants"])
    kept = Path(said["proxy"]["keys_path"])
    assert kept.stat().st_mode & 0o777 == 0o600
    digests = {one["digest"] for one in orjson.loads(kept.read_bytes())["keys"]}
    sent = {
        re.search(rb"Bearer (\S+)", request)[1]  # type: ignore[index]
        for request in bodies.size_requests(bodies.SIZES["1kb"], stream=False, keys=tenants.keys)
    }
    assert {hashlib.sha256(key).hexdigest() for key in sent} == digests


def test_another_checkout_is_measured_where_it_is_named_and_there(tmp_path: Path) -> None:
    def before(folder: Path | None) -> Rival:
        [found] = [r for r in rivals.all_rivals(tmp_path, folder) if r.name == "ours-before"]
        return found

    assert not before(None).installed()
    assert not before(tmp_path).installed()
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "__main__.py").touch()
    assert before(tmp_path).installed()
    ours = rivals.all_rivals(tmp_path)[0].command(site(tmp_path))
    assert before(tmp_path).command(site(tmp_path)) == ["env", "-C", str(tmp_path), *ours]


def test_two_regions_name_each_other(tmp_path: Path) -> None:
    here, there = (settings.region(number, (1, 2, 3, 4, 5)) for number in (0, 1))
    for one, other, port in ((here, there, 2), (there, here, 1)):
        [remote] = one["remote_regions"]
        assert remote["region"] == other["region"] != one["region"]
        assert remote["peer"] == other["proxy"]["peer_listen"]
        assert remote["url"] == f"http://127.0.0.1:{port}"


def test_nginx_keeps_its_log_at_the_default_or_has_none(tmp_path: Path) -> None:
    assert f"access_log {tmp_path}/access.log;" in rivals.nginx_config(
        site(tmp_path), access_log=True
    )
    without = rivals.nginx_config(site(tmp_path), access_log=False)
    assert "access_log off;" in without
    assert "server 127.0.0.1:2001;" in without


def test_routers_are_told_of_the_engines_and_the_policy(tmp_path: Path) -> None:
    router = rivals.Router("sglang", tmp_path, ["sglang-router", "launch"], "cache_aware")
    command = router.command(site(tmp_path))
    assert command[:2] == [str(tmp_path / "bin" / "sglang-router"), "launch"]
    assert command[command.index("--policy") + 1] == "cache_aware"
    assert command[-2:] == ["http://127.0.0.1:2000", "http://127.0.0.1:2001"]
    assert not router.installed()


def test_a_rival_that_is_not_installed_is_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = str(tmp_path)
    chosen = ["--rivals", "vllm-consistent_hash", "--rivals-venv", venv, "--no-install"]
    status = main(["bench", "--quick", *chosen])
    said = capsys.readouterr().err
    assert f"vllm-consistent_hash is left out, it is not installed: {venv}/bin/pip install" in said
    assert (status, "nothing is left to measure" in said) == (1, True)


def test_routers_are_installed_once_each_and_only_if_wanted(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    pip = tmp_path / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ntouch {tmp_path}/bin/$3\n')
    pip.chmod(0o755)
    said: list[str] = []
    everyone = rivals.all_rivals(tmp_path)
    rivals.install_routers([everyone[0], everyone[1]], tmp_path, said.append)
    assert said == []
    for _ in range(2):  # the second time they are there
        rivals.install_routers(everyone, tmp_path, said.append)
    assert (tmp_path / "asked").read_text().splitlines() == [
        "install --quiet sglang-router",
        "install --quiet vllm-router",
    ]
    assert said == ["installing sglang-router from PyPI", "installing vllm-router from PyPI"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--scenarios", "1kb,2kb"], "no scenario 2kb; there are 1kb, 16kb"),
        (["--rivals", "envoy"], "no rival envoy; there are ours, ours-key"),
        (["--rounds", "0"], "must be above 0"),
        (["--json", "/no/such/folder/x"], "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert complaint in capsys.readouterr().err


# --- a quick run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def cache(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compile for this test run alone."""
    monkeypatch.setattr(bench, "CACHE", programs)
    return programs


@NEEDS_COMPILER
def test_a_quick_run_of_ours(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    chosen = ["--rivals", "direct,ours,ours-watched", "--scenarios", "1kb,burst,ttfb,placement"]
    status = main(["bench", "--quick", "--quiet", *chosen, "--json", str(target)])
    value = orjson.loads(target.read_bytes())
    samples = {(one["scenario"], one["rival"]): one for one in value["samples"]}
    assert (status, [one["errors"] for one in value["samples"] if one["errors"]]) == (0, [])
    one = samples["1kb", "ours"]
    assert one["value"] > 0
    assert len(one["by_process"]) == 2  # the supervisor and its worker
    assert sum(one["by_replica"]) == one["requests"] > 0
    assert one["value"] == pytest.approx(sum(one["by_process"].values()), rel=0.01)
    assert samples["1kb", DIRECT]["value"] is None
    assert samples["burst", "ours"]["requests"] > 0
    assert samples["placement", "ours"]["notes"]["different_1kb"] == 0


@NEEDS_COMPILER
@pytest.mark.skipif(
    not rivals.Nginx("nginx", access_log=True).installed(), reason="nginx is not installed"
)
def test_a_quick_run_of_nginx(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    chosen = ["--rivals", "nginx", "--scenarios", "1kb,paced,upload,idle,streams"]
    status = main(["bench", "--quick", "--quiet", *chosen, "--json", str(target)])
    value = orjson.loads(target.read_bytes())
    samples = {one["scenario"]: one for one in value["samples"]}
    assert (status, [one["errors"] for one in value["samples"] if one["errors"]]) == (0, [])
    assert all(samples[name]["value"] > 0 for name in ("1kb", "paced", "idle", "streams"))
    assert samples["upload"]["notes"]["uploads"] >= 1
    for held, count in (("idle", "open"), ("streams", "under_way")):
        assert samples[held]["notes"][count] == samples[held]["requests"] > 0
    assert value["versions"]["nginx"].startswith("nginx version")


class Broken(Rival):
    """A proxy that ends as soon as it is started."""

    def command(self, site: Site) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no licence')"]


@NEEDS_COMPILER
def test_a_rival_that_does_not_start_fails_alone(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "all_rivals", lambda *_: [Broken("broken")])
    chosen = ["--rivals", "direct,broken", "--scenarios", "1kb"]
    status = main(["bench", "--quick", "--quiet", *chosen])
    said = capsys.readouterr().out
    assert status == 1
    assert "failed: broken, 1kb, round 1: broken ended with 1: no licence" in said
    folder = Path(re.search(r"the logs are in (\S+)", said)[1])  # type: ignore[index]
    shutil.rmtree(folder)


@contextlib.contextmanager
def engine(programs: Path) -> Iterator[native.Engine]:
    with native.engine(native.build("engine", programs), 2, processes.cores_here()) as one:
        yield one


@NEEDS_COMPILER
def test_a_rival_that_failed_to_start_is_not_started_again(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    class Counted(Broken):
        def command(self, site: Site) -> list[str]:
            started.append(self.name)
            return super().command(site)

    with engine(programs) as one:
        stand = bench.Stand(tmp_path, programs, one, seconds=0.1)
        subject = Subject(stand, Counted("broken"), processes.cores_here())
        for _ in range(2):
            with pytest.raises(RunError, match="no licence"):
                subject.kept()
    assert started == ["broken"]


def test_the_scenarios_have_names_of_their_own() -> None:
    assert len(BY_NAME) == len(SCENARIOS)
    assert all(isinstance(scenario, Scenario) and scenario.unit for scenario in SCENARIOS)
