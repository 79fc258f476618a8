"""From tiny wheels to a program on another host: bundle, split, tamper, resume, unpack."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy.airgap import archives, bundle, host, kinds, pack_cache, pack_criu, unpack, wheels
from deploy.airgap.archives import ArchiveError, Member, Part

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_NOISE = random.Random(5).randbytes(600_000)  # what no compression makes smaller


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return _write_index(tmp_path / "index")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bundle, to be copied before it is harmed."""
    index = _write_index(tmp_path_factory.mktemp("packed") / "index")
    assert _bundle(index) == 0
    return index.parent / "out"


def _write_index(folder: Path) -> Path:
    """Make a folder of two wheels: one with a library of noise and data files, one pure."""
    folder.mkdir()
    _write_wheel(
        folder,
        "noisy",
        "1.0",
        {
            "noisy/__init__.py": b"import tiny\nsize = 5\n",
            "noisy/lib.so": _NOISE,
            "noisy/stub.pyi": b"size: int\n",
            "noisy-1.0.data/purelib/noisy_extra.py": b"here = True\n",
            "noisy-1.0.data/scripts/noisy": b"#!python\n",
        },
        requires=("tiny", "absent-one", "only-here; extra == 'x'"),
    )
    _write_wheel(folder, "tiny", "2.0", {"tiny.py": b"size = 2\n"})
    (folder / "set.lock").write_text("# tried together\nnoisy==1.0\ntiny==2.0  # host\n")
    return folder


def _write_wheel(
    folder: Path, name: str, version: str, files: dict[str, bytes], requires: tuple[str, ...] = ()
) -> None:
    meta = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    records = {
        f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\n",
        f"{meta}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        for path, text in records.items():
            archive.writestr(path, text)
        listing = "".join(f"{path},,\n" for path in [*files, *records, f"{meta}/RECORD"])
        archive.writestr(f"{meta}/RECORD", listing)


def _bundle(index: Path, *more: str, name: str = "doherty") -> int:
    root = index.parent
    options = ["--lock", str(index / "set.lock"), "--jobs", "1"]
    if "--host" not in more:
        options += ["--python", _PYTHON]
    places = (
        "--find-links",
        str(index),
        "--cache",
        str(root / "cache"),
        "--out",
        str(root / "out"),
    )
    return bundle.main([name, *options, *places, *more])


def test_a_bundle_becomes_a_program(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, stage = index.parent / "out", index.parent / "stage"
    assert _bundle(index, "--archive-mib", "0.25") == 0
    told = capfd.readouterr().out
    assert "neither here nor on the host: absent-one (asked for by noisy)" in told
    assert "only-here" not in told
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["versions"] == {"noisy": "1.0", "tiny": "2.0"}
    assert manifest["left_out"]["*.pyi"]["files"] == 1
    sizes = [path.stat().st_size for path in out.glob("*.tar.xz*")]
    assert max(sizes) <= 0.25 * 2**20
    assert sum(sizes) == manifest["bytes"] > 500_000

    assert unpack.main([str(out), "--to", str(stage), "--jobs", "1"]) == 0
    script = "import noisy, tiny, noisy_extra, proxy, site, sys; print(noisy.size, tiny.size)"
    script += "; print(sys.prefix, site.ENABLE_USER_SITE)"
    python = stage / "doherty" / "bin" / "python"
    told = subprocess.run(
        [python, "-c", script], cwd=stage, capture_output=True, text=True, check=False
    )
    assert told.stdout.split() == ["5", "2", str(stage / "doherty"), "False"], told.stderr
    packages = unpack.packages(stage / "doherty")
    assert (packages / "noisy" / "lib.so").read_bytes() == _NOISE
    assert list((packages / "noisy" / "__pycache__").glob("*.pyc"))
    program = stage / "bin" / "doherty"
    environment = {"PATH": os.environ["PATH"]}
    told = subprocess.run(
        [program, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    path = subprocess.run(
        ["/bin/sh", "-c", f". {stage}/env.sh; command -v doherty; command -v python3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert path.stdout.split() == [str(program), str(python.with_name("python3"))]


def test_what_is_there_is_not_made_again(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, stage = index.parent / "out", index.parent / "stage"
    assert _bundle(index) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar.xz")}
    assert len(before) == 2
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "doherty-2.tar.xz").unlink()  # as if it had been cut off there
    (out / ".doherty-2.tar.xz.01.new").write_bytes(b"a beginning")
    (out / "manifest.json").rename(out / ".progress.json")
    assert _bundle(index) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar.xz")}
    assert after["doherty-1.tar.xz"] == before["doherty-1.tar.xz"]
    assert after["doherty-2.tar.xz"] != before["doherty-2.tar.xz"]
    assert json.loads((out / "manifest.json").read_text()) == manifest  # the same octets, too
    assert sorted(path.name for path in out.iterdir()) == [*sorted(before), "manifest.json"]

    assert unpack.main([str(out), "--to", str(stage), "--jobs", "1"]) == 0
    assert "doherty: 10 files unpacked" in capfd.readouterr().out
    stamp = stage / "doherty" / ".unpacked.json"
    done = json.loads(stamp.read_text())
    stamp.write_text(json.dumps(done[:2]))  # the key and one archive
    assert unpack.main([str(out), "--to", str(stage), "--jobs", "1"]) == 0
    files = int(capfd.readouterr().out.split(" files")[0].split()[-1])
    assert 0 < files < 10
    assert unpack.main([str(out), "--to", str(stage), "--jobs", "1"]) == 0
    assert "doherty: 0 files unpacked" in capfd.readouterr().out


def test_what_the_host_has_stays_out(index: Path) -> None:
    told = {"python": _PYTHON, "torch": "2.11.0", "cuda": "13.0", "arch": 90}
    path = index.parent / "host.json"
    path.write_text(json.dumps(told | {"packages": {"Tiny": "1.5", "noisy": "0.9"}}))
    assert _bundle(index, "--host", str(path)) == 0
    manifest = json.loads((index.parent / "out" / "manifest.json").read_text())
    assert manifest["versions"] == {"noisy": "1.0"}  # tiny of any version will do, noisy not
    assert manifest["unmet"] == ["absent-one (asked for by noisy)"]


def test_what_a_set_was_tried_without_is_not_missed(
    index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "# goes without: other Absent_One\n# goes without: more\nnoisy==1.0\n"
    (index / "set.lock").write_text(text)
    assert _bundle(index) == 0
    told = capfd.readouterr().out
    assert "neither here nor on the host: tiny (asked for by noisy)" in told
    assert "absent" not in told


def test_full_leaves_nothing_behind(index: Path) -> None:
    assert _bundle(index, "--full") == 0
    manifest = json.loads((index.parent / "out" / "manifest.json").read_text())
    assert manifest["left_out"] == {}
    assert manifest["files"] == 12


def test_old_sites_are_forgotten(index: Path) -> None:
    for release in range(bundle.SITES_KEPT + 2):
        _write_wheel(index, "tiny", f"2.{release}", {"tiny.py": b"size = %d\n" % release})
        (index / "set.lock").write_text(f"tiny==2.{release}\n")
        assert _bundle(index) == 0
    sites = index.parent / "cache" / "sites"
    assert len(list(sites.glob("*.json"))) == bundle.SITES_KEPT
    kept = [path for path in sites.iterdir() if path.is_dir()]
    assert len(kept) == bundle.SITES_KEPT
    last = f"size = {bundle.SITES_KEPT + 1}\n"
    assert last in [(path / "tiny.py").read_text() for path in kept]


def test_more_than_the_total_ends_the_packing(
    index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = index.parent / "out"
    # 600 kB of noise: in two parts it would have ended in the second.
    assert _bundle(index, "--total-mib", "0.1", "--archive-mib", "0.05") == 1
    assert "more than --total-mib allows; give --host" in capfd.readouterr().err
    assert [path.name for path in out.iterdir() if path.stat().st_size > 10_000] == []
    assert not (out / "manifest.json").exists()
    assert _bundle(index, "--total-mib", "1") == 0
    assert _bundle(index, "--total-mib", "0.1") == 1  # what is there counts, and stays
    assert (out / "manifest.json").exists()


def test_what_would_be_passed_over_is_refused(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {"python": _PYTHON, "torch": "2.11.0", "cuda": "13.0", "arch": 90, "packages": {}}
    described, unseen = tmp_path / "host.json", tmp_path / "unseen.json"
    described.write_text(json.dumps(known))
    unseen.write_text(json.dumps(known | {"arch": 0}))
    for more, says in (
        (("--find-links", str(tmp_path / "none")), f"--find-links: there is no folder {tmp_path}"),
        (("--host", str(described), "--python", "3.9"), "--python: "),
        (("--host", str(described), "--arch", "80"), f"{described} tells it; leave one of them"),
    ):
        assert _bundle(index, *more) == 2
        told = capfd.readouterr()
        assert says in told.err
        assert not told.out  # nothing was begun
    assert _bundle(index, "--host", str(unseen), "--arch", "80") == 0
    assert json.loads((index.parent / "out" / "manifest.json").read_text())["arch"] == 80


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--python", "x", "'x' is no release, such as 3.12"),
        ("--cuda", "13", "'13' is no release"),
        ("--archive-mib", "0", "'0' is no number above 0"),
        ("--archive-mib", "nan", "'nan' is no number above 0"),
        ("--total-mib", "much", "invalid"),
    ],
)
def test_a_host_or_a_bound_that_is_none_is_refused(
    flag: str, value: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        bundle.main(["doherty", "--out", str(tmp_path / "out"), flag, value])
    assert left.value.code == 2
    assert says in capfd.readouterr().err.splitlines()[-1]


def test_a_wheel_that_nobody_has_is_named(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (index / "set.lock").write_text("tiny==2.0\nunheard-of==9\n")
    assert _bundle(index) == 2
    assert "bundle: no wheel of unheard-of 9 for Python" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, not"),
        (lambda path: path.write_bytes(bytes([1]) + path.read_bytes()[1:]), "sha256 differs"),
        (lambda path: path.unlink(), "is missing; copy it again"),
    ],
    ids=["cut", "changed", "gone"],
)
def test_what_was_harmed_on_the_way_is_not_unpacked(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], harm: Any, says: str
) -> None:
    out, stage = tmp_path / "out", tmp_path / "stage"
    shutil.copytree(packed, out)
    harm(out / "doherty-1.tar.xz")
    assert unpack.main([str(out), "--to", str(stage), "--jobs", "1"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("unpack: ")
    assert says in error
    assert error.count("\n") == 1
    assert not list(stage.rglob("lib.so"))


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"python": "3.9"}, "was made for Python 3.9 and this is"),
        ({"name": "vllm", "torch": "9.9.0+cu130"}, "torch"),
    ],
)
def test_a_bundle_for_another_host_is_refused(
    packed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    told: dict[str, str],
    says: str,
) -> None:
    shutil.copytree(packed, tmp_path / "out")
    manifest = archives.read_manifest(packed) | told
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    arguments = [str(tmp_path / "out"), "--to", str(tmp_path / "stage"), "--jobs", "1"]
    assert unpack.main(arguments) == 1
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "stage" / "bin").exists()


def test_a_folder_without_archives_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert unpack.main([str(tmp_path), "--to", str(tmp_path / "stage")]) == 1
    assert "has no manifest.json" in capfd.readouterr().err


# As SGLang's, it does nothing when it is run as a module; only its `main` does.
_TELLS = b"""import json, os, sys
names = ("HF_HUB_OFFLINE", "TRITON_CACHE_DIR", "LD_LIBRARY_PATH", "PATH")
def main():
    there = {name: os.environ.get(name) for name in names}
    print(json.dumps([sys.argv[1:], sys.executable, there]))
"""


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_engine_starts_with_what_it_needs_unless_it_is_told_otherwise(
    index: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stage = index.parent / "stage"
    module = kinds.KINDS[name].module.replace(".", "/") + ".py"
    _write_wheel(index, name, "1", {module: _TELLS})
    (index / "set.lock").write_text(f"{name}==1\n")
    toolkit = index.parent / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart.so.13").touch()
    (toolkit / "bin" / "nvcc").write_text("")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:/usr/bin:/bin")
    assert _bundle(index, name=name) == 0
    out = str(index.parent / "out")
    assert unpack.main([out, "--to", str(stage), "--jobs", "1", "--any-host"]) == 0

    def start(**environment: str) -> tuple[list[str], str, dict[str, str | None]]:
        ran = subprocess.run(
            [stage / "bin" / name, "serve", "--port", "1"],
            env={"PATH": "/bin"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        arguments, python, seen = json.loads(ran.stdout)
        return arguments, python, seen

    arguments, python, seen = start(LD_LIBRARY_PATH="/there")
    assert arguments == ["serve", "--port", "1"]
    assert python == str(stage / name / "bin" / "python")
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["TRITON_CACHE_DIR"] == str(stage / "cache" / name / "triton")
    assert seen["PATH"] == f"{stage / 'bin'}:/bin"  # an engine is found by whoever was started
    needs_libraries = kinds.KINDS[name].cuda_libraries
    assert seen["LD_LIBRARY_PATH"] == (f"{toolkit}/lib64:/there" if needs_libraries else "/there")
    ran = subprocess.run(  # what else runs in the environment, such as an engine worker
        [stage / "bin" / f"{name}-python", "-c", "import os; print(os.environ['HF_HUB_OFFLINE'])"],
        env={"PATH": "/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "1\n"
    _, _, seen = start(HF_HUB_OFFLINE="0", TRITON_CACHE_DIR="/mine")
    assert (seen["HF_HUB_OFFLINE"], seen["TRITON_CACHE_DIR"]) == ("0", "/mine")


@pytest.mark.parametrize(("arch", "left"), [(90, True), (100, False)])
def test_rules_for_one_architecture_are_for_no_other(index: Path, arch: int, *, left: bool) -> None:
    files = {"vllm/_moe_C.abi3.so": b"moe", "vllm/a.pyi": b"", "vllm/__init__.py": b""}
    _write_wheel(index, "vllm", "1", files)
    (index / "set.lock").write_text("vllm==1\n")
    assert _bundle(index, "--arch", str(arch), name="vllm") == 0
    manifest = archives.read_manifest(index.parent / "out")
    assert ("vllm/_moe_C*" in manifest["left_out"]) == left
    assert "*.pyi" in manifest["left_out"]


def test_caches_go_out_and_come_back(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = index.parent
    out, stage = root / "out", root / "stage"
    assert pack_cache.main([str(stage), "vllm", str(out)]) == 1
    assert "holds nothing; start the engine once" in capfd.readouterr().err
    made = stage / "cache" / "vllm" / "triton" / "kernel.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    (made.parent / "kernel.lock").write_text("")
    assert pack_cache.main([str(stage), "vllm", str(out)]) == 0
    with tarfile.open(out / "vllm.cache.txz") as archive:
        assert archive.getnames() == ["triton/kernel.json"]
    assert _bundle(index, name="vllm") == 0
    assert (out / "vllm.cache.txz").exists()  # bundling again leaves it
    fresh = root / "fresh"
    arguments = [str(out), "--to", str(fresh), "--jobs", "1", "--any-host"]
    assert unpack.main(arguments) == 0
    assert "1 caches unpacked" in capfd.readouterr().out
    assert (fresh / "cache" / "vllm" / "triton" / "kernel.json").read_text() == "{}"
    launcher = (fresh / "bin" / "vllm").read_text()
    assert str(fresh / "cache" / "vllm" / "triton") in launcher
    assert unpack.main(arguments) == 0
    assert "0 caches unpacked" in capfd.readouterr().out


# --- archives -------------------------------------------------------------------------------------


def test_a_criu_comes_along_and_is_named(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "out")
    program = tmp_path / "made" / "criu"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho whole\n")
    program.chmod(0o755)
    pack_criu.pack(program.parent, tmp_path / "out")
    stage = tmp_path / "stage"
    assert unpack.main([str(tmp_path / "out"), "--to", str(stage), "--any-host"]) == 0
    told = subprocess.run(
        ["sh", "-c", f". {stage}/env.sh; $DOHERTY_CRIU"], capture_output=True, text=True, check=True
    )
    assert told.stdout == "whole\n"
    (tmp_path / "out" / archives.CRIU).write_bytes(b"harmed")
    assert unpack.main([str(tmp_path / "out"), "--to", str(stage), "--any-host"]) == 1


def test_holes_are_not_carried_and_come_back(tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "target"
    (root / "lib").mkdir(parents=True)
    with (root / "lib" / "big.so").open("wb") as sink:  # hole, content, hole, content, hole
        for at, content in ((3 << 20, b"one" * 50_000), (9 << 20, b"two")):
            sink.seek(at)
            sink.write(content)
        sink.truncate((20 << 20) + 5)
    (root / "zeros.so").write_bytes(bytes(2 << 20))
    (root / "run").write_bytes(b"x")
    (root / "run").chmod(0o755)
    (root / "empty").write_bytes(b"")
    parts = archives.pack(root, archives.list_members(root), tmp_path / "a.tar.xz", 1 << 30)
    assert [part.file for part in parts] == ["a.tar.xz"]
    assert archives.unpack(tmp_path, parts, target) == 4
    for name in ("lib/big.so", "zeros.so", "run", "empty"):
        assert (target / name).read_bytes() == (root / name).read_bytes(), name
    assert os.access(target / "run", os.X_OK)
    assert not os.access(target / "empty", os.X_OK)
    assert (target / "lib" / "big.so").stat().st_blocks * 512 < 4 << 20
    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        assert sorted(archive.getnames()) == ["empty", "lib/big.so", "run", "zeros.so"]


def test_the_same_files_give_the_same_octets(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        root = tmp_path / name
        root.mkdir()
        for file in ("x.py", "y.so") if name == "a" else ("y.so", "x.py"):
            (root / file).write_text(file * 1000)
        parts = archives.pack(root, archives.list_members(root), tmp_path / f"{name}.tar.xz", 99)
        assert len(parts) > 1
        assert max(part.bytes for part in parts) == 99
        digests.append([(part.bytes, part.sha256) for part in parts])
    assert digests[0] == digests[1]


def test_a_path_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tar.xz"
    (tmp_path / "payload").write_text("x")
    with tarfile.open(evil, "w:xz") as archive:
        archive.add(tmp_path / "payload", "../outside")
    part = Part(evil.name, evil.stat().st_size, archives.file_digest(evil))
    with pytest.raises(tarfile.OutsideDestinationError):
        archives.unpack(tmp_path, [part], tmp_path / "target")
    assert not (tmp_path / "outside").exists()


def test_archives_that_share_folders_are_unpacked_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may make a folder between the look of tarfile and its own making of it."""
    root = tmp_path / "root"
    (root / "shared" / "deep").mkdir(parents=True)
    (root / "shared" / "deep" / "one").write_text("x")
    parts = archives.pack(root, archives.list_members(root), tmp_path / "a.tar.xz", 1 << 30)

    def too_late(name: str, *_: object, **__: object) -> None:
        raise FileExistsError(17, "File exists", name)

    monkeypatch.setattr(os, "makedirs", too_late)
    assert archives.unpack(tmp_path, parts, tmp_path / "target") == 1
    assert (tmp_path / "target" / "shared" / "deep" / "one").read_text() == "x"


def test_work_is_shared_out_evenly_and_libraries_apart() -> None:
    mib = 1 << 20
    libraries = [
        Member(f"l{i}/x.abi3.so", mib, size * mib, False, "") for i, size in enumerate((50, 40, 30))
    ]
    text = [Member(f"{top}/{i}.py", mib, 10 * mib, False, "") for top in "ab" for i in range(3)]
    shares = archives.share_out([*libraries, *text])
    loads = [sum(member.content_bytes for member in share) // mib for share in shares]
    assert loads == [50, 40, 30, 30, 30]
    assert sorted(member for share in shares for member in share) == sorted([*libraries, *text])
    assert archives.share_out([]) == []


def test_a_manifest_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ArchiveError, match="of another form"):
        archives.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArchiveError, match="cannot be read"):
        archives.read_manifest(tmp_path)


# --- wheels and hosts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("vllm>=0.26", "set.lock:1: 'vllm>=0.26' is no NAME==VERSION; pin it"),
        ("a==1\nA==2", "set.lock:2: a is named twice"),
        ("# nothing", "set.lock names no package"),
    ],
)
def test_a_lock_that_does_not_pin_is_refused(line: str, says: str) -> None:
    with pytest.raises(wheels.WheelError, match=r"^set\.lock") as caught:
        wheels.read_lock(line, "set.lock")
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("path", sorted(bundle.LOCKS.glob("*.lock")), ids=lambda path: path.name)
def test_the_locks_that_come_along_can_be_read(path: Path) -> None:
    names = [line.name for line in wheels.read_lock(path.read_text(), path.name)]
    assert names == sorted(names)
    assert not {"torch", "triton"} & set(names)  # they are the host's, whatever it is


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("a-1-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp313-abi3-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_38_x86_64.whl", False),
        ("a-1-cp312-cp312-musllinux_1_2_x86_64.whl", False),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-py3-none-manylinux_2_28_x86_64.whl", True),
    ],
)
def test_only_wheels_that_fit_the_host_are_taken(tmp_path: Path, file: str, *, fits: bool) -> None:
    (tmp_path / file).touch()
    target = wheels.Host("3.12.3", "2.11.0", "13.0", 90, glibc="2.35")
    assert (("a", "1") in wheels.find_wheels(tmp_path, target)) == fits


def test_a_wheel_does_not_write_outside_its_folder(tmp_path: Path) -> None:
    _write_wheel(tmp_path, "evil", "1", {"../outside.py": b""})
    (tmp_path / "site").mkdir()
    with pytest.raises(wheels.WheelError, match="would write outside"):
        wheels.unpack_wheel(tmp_path / "evil-1-py3-none-any.whl", tmp_path / "site", (), {})


def test_a_host_is_described_so_that_bundle_reads_it(tmp_path: Path) -> None:
    described = host.describe()
    (tmp_path / "host.json").write_text(json.dumps(described | {"torch": "2.11.0", "arch": 90}))
    target = wheels.read_host(tmp_path / "host.json")
    assert target.python_minor == _PYTHON
    assert target.packages["msgspec"]
    (tmp_path / "host.json").write_text("[]")
    with pytest.raises(wheels.WheelError, match="does not describe a host"):
        wheels.read_host(tmp_path / "host.json")


@pytest.mark.parametrize(
    ("line", "arch"),
    [
        ("NVIDIA H200, 9.0, 143771, 580.159.04", 90),
        ("NVIDIA B200, 10.0, 183359, 580.159.04", 100),
        ("No devices were found", None),
        ("", None),
    ],
)
def test_the_card_is_read_from_the_table_of_the_driver(line: str, arch: int | None) -> None:
    card = host.read_card(line)
    assert (card and card["arch"]) == arch
