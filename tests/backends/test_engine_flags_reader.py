"""The reader of engines' sources, on sources made up in their manner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.engines.flags import Flag, FlagTable, parse_table
from backends.engines.release import Release

ROOT = Path(__file__).parents[2]

SGLANG_OLD = """
def add_cli_args(parser):
    parser.add_argument("--tensor-parallel-size", "--tp-size", type=int, default=1)
    parser.add_argument("--old-switch", action="store_true")
    parser.add_argument("--gone", action=DeprecatedAction, error_message="use another")
    parser.add_argument("--retired", action=DeprecatedAction)
"""
SGLANG_NEW = """
class ServerArgs:
    tp_size: A[int, Arg(help="ranks", aliases=["--tensor-parallel-size"])] = 1
    model_path: A[str, Arg(help="model", cli_name="--model-path", aliases=["--model"])]
    quiet: A[bool, "say less"] = False
    maybe_quiet: A[Optional[bool], Arg(help="x")] = None
    inner: A[int, Arg(no_cli=True)] = 0
    plain: int = 3
    paths: A[List[str], Arg(action=LoRAPathAction, action_kwargs={"nargs": "*"})] = None
    overlap: A[bool, Arg(action=argparse.BooleanOptionalAction)] = True

    def add_cli_args(parser):
        parser.add_argument("--config", type=str)
"""
VLLM_ENGINE = """
class EngineArgs:
    enforce_eager: bool = False
    seed: int = 0
    quantization: str | None = None
    cache: bool | str | None = None
    async_scheduling: bool | None = None

    def add_cli_args(parser):
        group.add_argument("--enforce-eager", **kwargs["enforce_eager"])
        group.add_argument("--seed", **kwargs["seed"])
        group.add_argument("--quantization", "-q", **kwargs["quantization"])
        group.add_argument("--cache", **kwargs["cache"])
        group.add_argument("--async-scheduling", **kwargs["async_scheduling"])
        group.add_argument("--served-name", nargs="?")
        group.add_argument("model", nargs="?")
"""
VLLM_FRONT = """
class FrontendArgs(BaseFrontendArgs):
    host: str | None = None
    enable_ids: bool = False

def make_arg_parser(parser):
    parser.add_argument("--headless", action="store_true")
"""


def unpacked(folder: Path, engine: str, version: str, files: dict[str, str]) -> Path:
    """Lay out a wheel."""
    root = folder / f"{engine}-{version}"
    (root / f"{engine}-{version}.dist-info").mkdir(parents=True)
    for name, text in files.items():
        path = root / engine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def read(engine: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy/engine_flags.py"), engine, *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def table(engine: str, *folders: Path) -> FlagTable:
    run = read(engine, *folders)
    assert run.returncode == 0, run.stderr
    return parse_table(engine, run.stdout)


def kinds(found: FlagTable) -> dict[str, str]:
    return {name: flag.kind for name, flag in found.flags.items()}


def test_flags_of_sglang_before_and_after_it_declared_them(tmp_path: Path) -> None:
    old = unpacked(tmp_path, "sglang", "0.5.9", {"srt/server_args.py": SGLANG_OLD})
    new = unpacked(
        tmp_path,
        "sglang",
        "0.5.10.post1",
        {"srt/server_args.py": "x = 1", "srt/arg_groups/fields/all.py": SGLANG_NEW},
    )
    found = table("sglang", new, old)
    assert found.releases == (Release(0, 5, 9), Release(0, 5, 10))
    assert kinds(found) == {
        "--config": "value",
        "--help": "switch",
        "-h": "switch",
        "--maybe-quiet": "switch",
        "--model": "value",
        "--model-path": "value",
        "--model-type": "value",
        "--old-switch": "switch",
        "--overlap": "either",
        "--paths": "value",
        "--quiet": "switch",
        "--retired": "switch",
        "--tensor-parallel-size": "value",
        "--tp-size": "value",
    }
    first, last = found.releases
    both = Flag("--tensor-parallel-size", "value", first, None, "--tp-size")
    assert found.flags["--tensor-parallel-size"] == both, "the newest says what is the alias"
    assert found.flags["--old-switch"] == Flag(
        "--old-switch", "switch", first, first, "--old-switch"
    )
    assert found.flags["--quiet"].since == last


def test_flags_of_vllm(tmp_path: Path) -> None:
    files = {"engine/arg_utils.py": VLLM_ENGINE, "entrypoints/common/cli_args.py": VLLM_FRONT}
    found = table("vllm", unpacked(tmp_path, "vllm", "0.30.0", files))
    assert kinds(found) == {
        "--async-scheduling": "either",
        "--cache": "maybe",
        "--enable-ids": "either",
        "--enforce-eager": "either",
        "--headless": "switch",
        "--help": "switch",
        "-h": "switch",
        "--host": "value",
        "--quantization": "value",
        "-q": "value",
        "--seed": "value",
        "--served-name": "maybe",
    }
    assert found.flags["-q"].stands_for == "--quantization"


@pytest.mark.parametrize(("words", "code"), [((), 2), (("trt",), 2), (("vllm",), 2)])
def test_usage(words: tuple[str, ...], code: int) -> None:
    command = [sys.executable, str(ROOT / "deploy/engine_flags.py"), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (code, "")
    assert "usage:" in run.stderr


def test_a_folder_that_is_no_wheel(tmp_path: Path) -> None:
    run = read("vllm", tmp_path)
    assert run.returncode == 1
    assert "unpack a wheel there" in run.stderr
