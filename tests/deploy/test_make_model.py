"""Model folders: real shapes, a tokenizer that names every id, a template that renders."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers

from deploy.airgap import make_model, random_weights
from loadtest.words import WORDS

_NAMES = ("qwen3-8b", "eagle3-llama-3.1-8b")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    assert make_model.main([str(folder), *_NAMES, "--layers", "2"]) == 0
    return folder


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("name", _NAMES)
def test_every_id_has_a_name_and_text_comes_back(models: Path, name: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(models / name / "tokenizer.json"))
    vocabulary = _read(models / name / "config.json")["vocab_size"]
    assert tokenizer.get_vocab_size() == vocabulary
    assert tokenizer.decode([vocabulary - 1]) == f" w{vocabulary - 1}"
    text = "def räuber(x):\n    return x ** 2  # 漢字\n"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert max(encoded.ids) < make_model.TRAINED_TOKENS
    assert len(encoded.ids) < len(text)
    assert tokenizer.encode(make_model.EOS).ids == [make_model.EOS_ID]


def test_a_word_of_the_load_tests_is_one_token(models: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(models / "qwen3-8b" / "tokenizer.json"))
    assert {len(tokenizer.encode(f" {word}").ids) for word in WORDS} == {1}


def test_the_template_renders_a_chat(models: Path) -> None:
    template = _read(models / "qwen3-8b" / "tokenizer_config.json")["chat_template"]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    # As the engines do, through transformers.
    environment = jinja2.Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(template)
    assert rendered.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_same_octets_come_twice(models: Path, tmp_path: Path) -> None:
    assert make_model.main([str(tmp_path), "qwen3-8b", "--layers", "2"]) == 0
    for path in (tmp_path / "qwen3-8b").iterdir():
        assert path.read_bytes() == (models / "qwen3-8b" / path.name).read_bytes(), path.name


def _parameters(config: dict[str, Any]) -> int:
    """Count the weights of a dense decoder from its sizes."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    attention = 2 * hidden * head * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * hidden * inner
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden


@pytest.mark.parametrize(
    ("name", "billions"),  # as the models' cards give them
    [("qwen3-8b", 8.2), ("llama-3.1-8b", 8.0), ("qwen3-0.6b", 0.6)],
)
def test_the_shapes_are_those_of_the_published_models(name: str, billions: float) -> None:
    assert round(_parameters(make_model.MODELS[name]) / 1e9, 1) == billions


@pytest.mark.parametrize("target", ["qwen3-8b", "llama-3.1-8b"])
def test_a_draft_matches_its_target(target: str) -> None:
    draft, model = make_model.shape(f"eagle3-{target}", 9), make_model.shape(target, 9)
    assert draft["num_hidden_layers"] == 1
    assert model["num_hidden_layers"] == 9
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        assert draft[key] == model[key], key
    assert draft["draft_vocab_size"] < model["vocab_size"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["gpt-9"], "no model is called 'gpt-9'"), (["--layers", "0"], "--layers must be 1 or more")],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        make_model.main([str(tmp_path), *arguments])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["vllm", "sglang", ""])
def test_a_python_without_tokenizers_hands_over_to_an_engines(tmp_path: Path, engine: str) -> None:
    # As after env.sh, whose python3 is not an engine's. The last stage's one engine has none, too.
    python = tmp_path / (engine or "vllm") / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {0 if engine else 1}\necho $0 "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-S", make_model.__file__, "models", "qwen3-8b", "--layers", "2"]
    environment = {"PATH": os.environ["PATH"], "STAGE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if engine:
        assert done.stdout.split() == [str(python), *command[2:]]
    else:
        assert done.returncode == 1
        assert "has no tokenizers; use a Python that has, or unpack an engine's" in done.stderr


def test_random_weights_are_a_checkpoint_and_the_same_from_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back without the package that engines read it with: by the format's own description."""
    monkeypatch.setattr(random_weights, "CHUNK_WEIGHTS", 1000)
    config = make_model.shape("qwen3-0.6b", 2) | {
        "hidden_size": 32,
        "vocab_size": 64,
        "intermediate_size": 48,
    }
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        random_weights.write_weights(tmp_path / name, config, seed)
    index = _read(tmp_path / "one" / random_weights.INDEX)
    (file,) = set(index["weight_map"].values())
    octets = (tmp_path / "one" / file).read_bytes()
    assert octets == (tmp_path / "again" / file).read_bytes()
    assert octets != (tmp_path / "other" / file).read_bytes()
    (length,) = struct.unpack_from("<Q", octets)
    header = json.loads(octets[8 : 8 + length])
    del header["__metadata__"]
    assert set(header) == set(index["weight_map"]) == set(random_weights.tensors_of(config))
    assert "lm_head.weight" not in header  # they are tied
    data = octets[8 + length :]
    assert index["metadata"]["total_size"] == len(data)
    start, end = header["model.layers.1.mlp.down_proj.weight"]["data_offsets"]
    weights = [struct.unpack("<f", b"\0\0" + data[at : at + 2])[0] for at in range(start, end, 2)]
    assert len(weights) == 32 * 48
    assert all(2**-13 <= abs(weight) < 2**-11 for weight in weights)
    assert abs(sum(weight > 0 for weight in weights) / len(weights) - 0.5) < 0.1
    start, end = header["model.norm.weight"]["data_offsets"]
    assert data[start:end] == b"\x80\x3f" * 32


def test_weights_are_shared_out_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 50_000)
    config = make_model.shape("llama-3.1-8b", 2) | {
        "hidden_size": 64,
        "vocab_size": 256,
        "intermediate_size": 64,
        "head_dim": 4,
    }
    (tmp_path / "model-00001-of-00099.safetensors").touch()  # of a checkpoint before
    total = random_weights.write_weights(tmp_path, config, 1)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = _read(tmp_path / random_weights.INDEX)
    assert len(files) > 1
    assert files == sorted(set(index["weight_map"].values()))
    assert sum((tmp_path / file).stat().st_size for file in files) > total
    with pytest.raises(ValueError, match="no weights are known"):
        random_weights.tensors_of(make_model.MODELS["eagle3-qwen3-8b"])
