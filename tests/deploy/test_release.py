"""A release: the same octets wherever it is built, what belongs in it, and it serves by itself."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request, urlopen

import msgspec
import pytest

from tests.fakes.programs import Program, environment, fetch

ROOT = Path(__file__).parents[2]
VERSION = str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


release_checks: Any = load("release_checks")
release: Any = load("release")
licences: Any = load("licences")


class Built(msgspec.Struct, frozen=True):
    wheel: Path
    sdist: Path
    again: tuple[Path, Path]
    sources: tuple[str, ...]

    def faults(self, wheel: Path | None = None, sdist: Path | None = None) -> str:
        """Return what is wrong with these; empty if nothing is."""
        made = wheel or self.wheel, sdist or self.sdist
        try:
            release_checks.check(*made, sources=self.sources, root=ROOT, version=VERSION)
        except release_checks.ReleaseError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("release")
    try:
        sources = release.tracked()
    except release_checks.ReleaseError as error:
        pytest.skip(str(error))
    wheel, sdist = release.build(folder / "one", 1_700_000_000)
    again = release.build_otherwise(folder / "another" / "place", 1_700_000_000)
    return Built(wheel, sdist, again, sources)


# --- what is built --------------------------------------------------------------------------------


def test_built_elsewhere_under_other_settings_it_is_the_same_octets(built: Built) -> None:
    for one, other in zip((built.wheel, built.sdist), built.again, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_wheel_and_sources_hold_what_belongs_there_and_nothing_else(built: Built) -> None:
    assert built.faults() == ""
    assert built.wheel.stat().st_size < 4 * 1024 * 1024
    names = set(zipfile.ZipFile(built.wheel).namelist())
    assert {"proxy/dashboard/index.html", "proxy/py.typed", "backends/py.typed"} <= names


def test_times_and_modes_are_nobody_s(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert {(one.uid, one.gid, one.uname, one.gname) for one in members} == {(0, 0, "", "")}
    assert {one.mtime for one in members} == {1_700_000_000}
    assert {one.mode for one in members} <= {0o644, 0o755}
    assert [one.name for one in members] == sorted(one.name for one in members)


def rewritten(wheel: Path, target: Path, change: dict[str, bytes | None]) -> Path:
    """Copy a wheel with some files otherwise, or, where there are no octets, left out."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as copy:
        files = {name: source.read(name) for name in source.namelist()}
        for name, octets in {**files, **change}.items():
            if octets is not None:
                copy.writestr(name, octets)
    return target


INFO = f"doherty-{VERSION}.dist-info"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"proxy/dashboard/app.js": None}, "proxy/dashboard/app.js is missing from the wheel"),
        ({"tests/conftest.py": b""}, "tests/conftest.py has no place in the wheel"),
        ({"proxy/app.py": str(ROOT).encode()}, "proxy/app.py in the wheel names a folder of this"),
        ({f"{INFO}/licenses/LICENSE": None}, "the licence LICENSE is missing from the wheel"),
        ({f"{INFO}/METADATA": b"Name: doherty\n"}, "METADATA: "),
        ({f"{INFO}/WHEEL": b"Root-Is-Purelib: false\n"}, "the wheel is for one platform"),
        (
            {f"{INFO}/entry_points.txt": b"[console_scripts]\ndoherty = gone.cli:main\n"},
            "the command doherty leads to gone.cli:main",
        ),
    ],
)
def test_what_is_wrong_with_a_wheel_is_said(
    built: Built, tmp_path: Path, change: dict[str, bytes | None], words: str
) -> None:
    wheel = rewritten(built.wheel, tmp_path / built.wheel.name, change)
    assert words in built.faults(wheel=wheel)


def test_what_lies_about_in_the_sources_is_said(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / built.sdist.name
    with tarfile.open(built.sdist) as source, tarfile.open(copy, "w:gz", compresslevel=1) as target:
        for member in source:
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
        target.addfile(tarfile.TarInfo(f"doherty-{VERSION}/doherty-keys.json"), io.BytesIO())
    expected = "doherty-keys.json has no place in the source distribution"
    assert expected in built.faults(sdist=copy)


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x y z'\n")
    with pytest.raises(release_checks.ReleaseError, match=r"the wheel cannot be built:(.|\n)+name"):
        release.run_build("wheel", tmp_path, tmp_path / "out", os.environ)


def test_two_builds_that_differ_are_no_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_each_time(folder: Path, _epoch_s: int) -> tuple[Path, Path]:
        folder.mkdir(parents=True)
        made = folder / "a.whl", folder / "a.tar.gz"
        for path in made:
            path.write_text(str(folder))
        return made

    monkeypatch.setattr(release, "commit_time_s", lambda: 0)
    monkeypatch.setattr(release, "build", other_each_time)
    monkeypatch.setattr(release, "build_otherwise", other_each_time)
    assert release.main(["--draft", "--out", str(tmp_path / "dist")]) == 1
    assert capsys.readouterr().err == "release: a.whl differs when it is built again\n"
    assert list((tmp_path / "dist").iterdir()) == []


def test_what_is_not_committed_is_not_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "git", lambda *_: " M proxy/app.py")
    assert release.main(["--out", str(tmp_path / "dist")]) == 1
    assert "the tree differs from its commit" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()


def test_outside_a_checkout_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "project_version", lambda: VERSION)
    assert release.main(["--out", str(tmp_path / "dist")]) == 1
    assert "a release is built from a checkout" in capsys.readouterr().err


# --- versions and changes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("## [1.2.0] - 2026-01-02\n", None),
        ("# C\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-02\n", None),
        ("# C\n\n## [Unreleased]\n\n- x\n\n## [1.2.0] - 2026-01-02\n", "unreleased changes"),
        ("# C\n\n## [Unreleased]\n\n- x\n", "unreleased changes"),
        ("## [1.2.0]\n", "wants its day"),
        ("## [1.1.0] - 2026-01-02\n", "no section 1.2.0"),
        ("## [1.1.0] - 2026-01-02\n\n## [1.2.0] - 2026-01-02\n", "no section 1.2.0"),
        ("", "no section 1.2.0"),
    ],
)
def test_a_release_wants_its_section_of_the_changes(text: str, words: str | None) -> None:
    if words is None:
        release_checks.check_changelog(text, "1.2.0")
        return
    with pytest.raises(release_checks.ReleaseError, match=re.escape(words)):
        release_checks.check_changelog(text, "1.2.0")


def test_newest_changes_are_unreleased_or_of_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", VERSION)
    assert len(set(headings)) == len(headings)


def test_every_file_that_names_the_release_names_this_one() -> None:
    named = {
        "deploy/Dockerfile": r"^ARG VERSION=(\S+)",
        "deploy/compose.yaml": r"DOHERTY_VERSION:-([^}]+)\}",
        "deploy/kubernetes/kustomization.yaml": r"doherty, newTag: ([^}]+)\}",
        "deploy/guides/kubernetes.md": r"/doherty:(\S+)",
    }
    for name, pattern in named.items():
        found = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert set(found) == {VERSION}, name


# --- licences -------------------------------------------------------------------------------------

BESIDE_A_PROXY = (licences.BASE, "docker", "jwt", "otel", "postgres", "ray", "top")
COPYLEFT = re.compile(r"\b(?:[AL]?GPL|GNU|SSPL|EUPL|CDDL|EPL|CC-BY-SA|OSL)", re.IGNORECASE)


def test_licences_list_all_that_is_asked_for_and_its_licence() -> None:
    page = (ROOT / "deploy" / "licences.md").read_text()
    sections = dict(
        re.findall(r"^## (?:Extra `)?([\w]+).*?\n(.+?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    )
    for group, wanted in licences.declared().items():
        title = "Always" if group == licences.BASE else group
        for name in {licences.canonicalize_name(one.name) for one in wanted} - {"doherty"}:
            assert re.search(
                rf"^\| \*\*{re.escape(name)}\*\* \| \w", sections[title], re.MULTILINE
            ), name


@pytest.mark.parametrize("group", BESIDE_A_PROXY)
def test_nothing_that_runs_beside_a_proxy_is_copyleft(group: str) -> None:
    found = licences.closure(licences.declared()[group])
    assert found
    assert {
        name: said for name, said in found.items() if said == "?" or COPYLEFT.search(said)
    } == {}


def test_what_is_in_force_for_a_licence_is_seen() -> None:
    assert COPYLEFT.search("GPL-3.0-or-later")
    assert COPYLEFT.search("GNU Lesser General Public License v3 (LGPLv3)")
    assert not COPYLEFT.search("MPL-2.0 AND (Apache-2.0 OR MIT)")
    assert licences.licence("no-such-package") == "?"


# --- installed ------------------------------------------------------------------------------------


class Installation(msgspec.Struct, frozen=True):
    """An environment with the wheel and what it cannot do without, and an empty folder."""

    folder: Path

    @property
    def doherty(self) -> str:
        return str(self.folder / "env" / "bin" / "doherty")

    @property
    def cwd(self) -> Path:
        return self.folder / "empty"

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.doherty, *args],
            cwd=self.cwd,
            env=environment({"PYTHONPATH": "", **env}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def copy_distribution(name: str, site: Path) -> None:
    """Install what is installed here: the same files, listed by the same RECORD."""
    found = distribution(name)
    for path in found.files or ():
        if ".." not in path.parts:  # commands lie outside, and are not needed
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.locate(), target)


@pytest.fixture(scope="module")
def installation(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """By pip without an index: what the wheel asks for is copied from here, and no more."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "empty").mkdir()
    env = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (site,) = env.glob("lib/python*/site-packages")
    for name in licences.closure(licences.declared()[licences.BASE]):
        copy_distribution(name, site)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", env)
    # Without --no-deps: pip itself finds that nothing is missing.
    installing = (*pip, "install", "--no-index", "--no-compile", built.wheel)
    done = subprocess.run(installing, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installation(folder)


@pytest.fixture
def up(installation: Installation, tmp_path: Path) -> Iterator[Program]:
    ports = ("--port=0", "--admin-port=0", "--manager-port=0")
    argv = (installation.doherty, "up", *ports)
    program = Program(argv, tmp_path / "up.log", cwd=installation.cwd, env={"PYTHONPATH": ""})
    try:
        yield program
    finally:
        program.end()


def test_what_pip_installs_serves_from_an_empty_folder(up: Program) -> None:
    url = up.until_said(r"Ready: (http://\S+)/v1")[1]
    admin_url = up.until_said(r"admin +(http://\S+)")[1]
    (model,) = (one["id"] for one in fetch(f"{url}/v1/models").value["data"])
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urlopen(request) as answer:
        lines = answer.read().decode().strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    page = fetch(admin_url + "/")
    assert page.status == 200
    for script in re.findall(r'(?:src|href)="([^"#:]+)"', page.text):
        assert fetch(f"{admin_url}/{script.lstrip('/')}").status == 200
    assert f'version="{VERSION}"' in fetch(admin_url + "/metrics").text


def test_installed_commands_answer(installation: Installation) -> None:
    assert installation.run("--version").stdout.startswith(f"doherty {VERSION}\n")
    assert "complete" in installation.run("completion", "bash").stdout
    config = installation.folder / "doherty.yaml"
    config.write_text("version: 1\nmodels: [{name: demo, pools: [{engine: simulator}]}]\n")
    checked = installation.run("check", str(config))
    assert (checked.returncode, checked.stderr) == (0, "")


POOL = "models: [{name: demo, pools: [{engine: simulator}]}]\n"
IN_DOCKER = POOL.replace("simulator", "simulator, image: x") + "manager: {provider: docker}\n"
WORKER = ("--worker-urls", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("extra", "command", "config"),
    [
        ("docker", ("manager",), IN_DOCKER),
        ("ray", ("manager",), POOL + "manager: {provider: ray}\n"),
        ("jwt", ("proxy", *WORKER), POOL + "jwt: {issuer: 'https://x.example', audience: a}\n"),
        ("otel", ("proxy", *WORKER, "--enable-trace"), ""),
        ("postgres", ("offline",), ""),
        ("compile", ("compile",), ""),
    ],
)
def test_the_want_of_an_extra_is_one_line_that_says_what_to_install(
    installation: Installation, tmp_path: Path, extra: str, command: tuple[str, ...], config: str
) -> None:
    if config:
        (tmp_path / "doherty.yaml").write_text(config)
        command = (*command, "--config", str(tmp_path / "doherty.yaml"))
    done = installation.run(*command, DOHERTY_STORE="postgresql://127.0.0.1:9/x")
    assert done.returncode in (1, 2), done.stdout
    assert f"pip install 'doherty[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_top_without_its_extra_says_what_to_install(installation: Installation) -> None:
    ours, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [installation.doherty, "top"],
            cwd=installation.cwd,
            env=environment({"PYTHONPATH": "", "TERM": "xterm"}),
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(terminal)
    assert done.returncode == 2
    assert "pip install 'doherty[top]'" in done.stderr.splitlines()[-1]
