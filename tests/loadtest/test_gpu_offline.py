"""Jobs on a GPU, rehearsed with the simulator in the engine's place."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.gpu import bare_llm
from loadtest.gpu.offline import Run, prove
from loadtest.gpu.offline_stage import Setting, vllm_python
from loadtest.gpu.steps import Verdict
from loadtest.run import RunError


def test_the_three_ways_are_compared(tmp_path: Path) -> None:
    setting = Setting(
        engine="simulator",
        model_path="",
        args=("--profile", "fast", "--max-num-seqs", "16"),
        lines=40,
        shared_lines=20,
        prefixes=4,
        prefix_words=30,
        in_flight=16,
    )
    forms = ("forms", "forms served", "forms embedded")
    bare, doherty, served = asyncio.run(prove(Run(setting, tmp_path, tmp_path), forms, 0.0))
    assert bare.verdict is Verdict.PASS
    assert served.verdict is Verdict.PASS
    # A job of an instant says nothing of speed; that all lines were answered is claimed as well.
    assert all("of bare, promised" in claim for claim in doherty.broken)
    assert float(str(doherty.figures["different: over bare"])) > 0
    assert float(str(served.figures["doherty over served"])) > 0


def test_the_python_of_a_vllm_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no command 'vllm'"):
        vllm_python()
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    assert vllm_python() == [sys.executable]
    own = tmp_path / "vllm-python"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert vllm_python() == [str(own)]


_VLLM = """
from types import SimpleNamespace as Some
def SamplingParams(**fields): return Some(**fields)
class LLM:
    @staticmethod
    def from_engine_args(args): assert args.disable_log_stats; return LLM()
    def generate(self, prompts, params, use_tqdm):
        choices = [[Some(token_ids=[0] * each.max_tokens)] for each in params]
        return [Some(prompt_token_ids=p.split(), outputs=c, finished=True, num_cached_tokens=None)
                for p, c in zip(prompts, choices)]
    def reset_prefix_cache(self): pass
"""
_ARGS = """
class EngineArgs:
    @staticmethod
    def add_cli_args(parser): parser.add_argument("--model"); return parser
    @staticmethod
    def from_cli_args(args): return args
"""


def test_the_yardstick_of_vllm_counts_what_its_outputs_say(tmp_path: Path) -> None:
    for name, text in (
        ("vllm/__init__.py", _VLLM),
        ("vllm/engine/__init__.py", ""),
        ("vllm/engine/arg_utils.py", _ARGS),
        ("vllm/utils/__init__.py", ""),
        (
            "vllm/utils/argparse_utils.py",
            "from argparse import ArgumentParser as FlexibleArgumentParser",
        ),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    body = {"prompt": "a b c", "max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    file = tmp_path / "lines.jsonl"
    file.write_text(2 * (json.dumps({"body": body}) + "\n"))
    command = [sys.executable, str(bare_llm.__file__), "--input", str(file), "--warm", str(file)]
    ran = subprocess.run(
        [*command, "--", "--model", "m"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(ran.stdout.removeprefix("FIGURES "))
    assert (figures["lines"], figures["prompt_tokens"], figures["completion_tokens"]) == (2, 6, 8)
