"""`doherty check` on a machine without engines, and without the cards that the pools need."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.checking import check_cards, check_engines, none_can_start
from backends.cli import main
from backends.engines.features import VLLM_RANGE
from proxy.config import ConfigError, parse_config

MODEL = "  - {{name: {name}, pools: [{{engine: {engine}, args: [{args}], {more}}}]}}\n"


def model(name: str, engine: str = "vllm", args: str = "", more: str = "") -> str:
    return MODEL.format(name=name, engine=engine, args=args, more=more)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no engine at all; returns the path of a file to check."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    for name in ("DOHERTY_ENGINE_PYTHON", "DOHERTY_GPUS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "f.yaml"


@pytest.mark.parametrize(
    ("engine", "args", "warning"),
    [
        (
            "vllm",
            "--gpu-memory-utilisation, '0.5'",
            "vllm 0.33.0 has no flag --gpu-memory-utilisation; did you mean "
            "--gpu-memory-utilization?",
        ),
        (
            "sglang",
            "--tensor-paralel-size, '2'",
            "sglang 0.5.23 has no flag --tensor-paralel-size; did you mean --tensor-parallel-size?",
        ),
    ],
)
def test_a_wrong_flag_of_an_engine_that_is_not_here_is_warned_of(
    bare: Path, capsys: pytest.CaptureFixture[str], engine: str, args: str, warning: str
) -> None:
    bare.write_text("models:\n" + model("m", engine, args))
    assert main(["check", str(bare)]) == 0
    told = capsys.readouterr()
    assert (
        f"{bare}: warning: model 'm': by the newest release that is known: {warning}\n" in told.err
    )
    assert f"program '{engine}' was not found" in told.err


def test_up_ends_with_how_to_install_it_where_no_engine_is_here(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = model("m") + model("n", "sglang", more="target_inputs: 4, autoscale: {min: 0, max: 2}")
    bare.write_text("models:\n" + pools)
    assert main(["up", str(bare), "--run-dir", str(bare.parent / "run")]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "no model could be served:\nmodel 'm': program 'vllm' was not found" in told.err
    assert "model 'n': program 'sglang' was not found" in told.err


@pytest.mark.parametrize(
    ("manager", "other"),
    [
        ("{provider: docker, docker: {images: {vllm: 'vllm/vllm-openai:v0.26.0'}}}", ""),
        ("{provider: ray}", ""),
        ("{}", "  - {name: n, pools: [{engine: simulator}]}\n"),
    ],
)
def test_where_some_engine_could_start_nobody_is_refused(
    manager: str, other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_config(f"manager: {manager}\nmodels:\n{model('m')}{other}", "f")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert none_can_start(config, {}) is None


def test_what_is_not_to_start_is_not_missed(bare: Path) -> None:
    for text in ("version: 1", "models:\n" + model("m", more="replicas: 0")):
        assert none_can_start(parse_config(text, "f"), {}) is None
    assert bare.parent.is_dir()


def test_a_good_file_for_another_machine_is_told_only_what_is_missing(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.write_text("models:\n" + model("m", args="-tp, '2'"))
    assert main(["check", str(bare)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "was not found" in line


CARDS = [
    pytest.param("0-1", model("m", args="-tp, '2'"), (), id="enough"),
    pytest.param("auto", model("m", args="-tp, '8'"), (), id="auto"),
    pytest.param("none", model("m", args="-tp, '8'"), (), id="none"),
    pytest.param("0", model("m", "simulator", more="replicas: 9"), (), id="simulators"),
    pytest.param(
        "0", model("m", more="replicas: 3, env: {CUDA_VISIBLE_DEVICES: '0'}"), (), id="own"
    ),
    pytest.param(
        "0-1",
        model("m") + model("v", args="-tp, '4'"),
        ("more GPUs than the 2 of manager.gpus (0-1) are needed by v-0 (4)",),
        id="one that is too large",
    ),
    pytest.param(
        "0-1",
        model("m", more="replicas: 2") + model("v", more="gpus: 1"),
        ("the replicas need 3 GPUs together, and manager.gpus (0-1) names 2: some will wait",),
        id="too many",
    ),
]


@pytest.mark.parametrize(("cards", "models", "warnings"), CARDS)
def test_cards_that_are_named_and_needed(
    cards: str, models: str, warnings: tuple[str, ...]
) -> None:
    assert check_cards(parse_config("models:\n" + models, "f"), cards) == warnings


def test_the_cards_are_those_of_the_environment_before_the_file(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.write_text("manager: {gpus: 0-3}\nmodels:\n" + model("m", args="-tp, '4'"))
    assert main(["check", str(bare)]) == 0
    assert "more GPUs" not in capsys.readouterr().err
    monkeypatch.setenv("DOHERTY_GPUS", "0-1")
    assert main(["check", str(bare)]) == 0
    assert "more GPUs than the 2 of manager.gpus (0-1)" in capsys.readouterr().err


def test_of_an_engine_in_an_image_the_tag_says_what_it_takes() -> None:
    text = """\
manager: {{provider: docker, docker: {{images: {{vllm: 'vllm/vllm-openai:v{release}'}}}}}}
models: [{{name: m, pools: [{{engine: vllm, args: [{flag}]}}]}}]
"""
    newest = str(VLLM_RANGE.newest)
    config = parse_config(text.format(release=newest, flag="--max-num-seqs=4"), "f")
    assert check_engines(config, "f", {}) == ()
    config = parse_config(text.format(release=newest, flag="--no-such-flag=4"), "f")
    with pytest.raises(ConfigError, match="--no-such-flag"):
        check_engines(config, "f", {})
