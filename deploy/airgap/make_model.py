"""Model folders of real shapes, without weights or with random ones.

    python3 deploy/airgap/make_model.py OUT [NAME ...] [--layers N] [--weights SEED]

A folder holds what an engine reads before the weights: the architecture and sizes of the published
model, a byte-level BPE tokenizer trained here from Python's own library and the words of our load
tests (each one token, as published vocabularies have them), and a chat template.
A model with random weights may pick any id, so every id of the vocabulary has a name: those beyond
the trained ones decode to a word and are never encoded. `--layers` makes a smaller one for smoke
tests; drafts have one layer anyway. The same Python and tokenizers give the same octets.

Without weights, engines start with `--load-format dummy` and draw their own. `--weights SEED`
writes a checkpoint of random ones (`random_weights`), which can be read again; not for drafts.

Needs the package tokenizers, which comes with transformers and so with either engine. A Python that
lacks it hands over to an engine's of the unpacked stage that `env.sh` names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.airgap.random_weights import write_weights
from loadtest.words import WORDS

TRAINED_TOKENS = 8192
CORPUS_FILES_MAX = 120
WORDS_REPEATED = 10_000  # more often than any word of the library, so that they are learned first
CONTEXT_TOKENS_MAX = 131072
ENGINES = ("vllm", "sglang")  # whose bundles bring tokenizers along
PAD, EOS, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
PAD_ID, EOS_ID = 0, 1
TEMPLATE = (
    "{% for m in messages %}" + START + "{{ m['role'] }}\n{{ m['content'] }}" + EOS + "\n"
    "{% endfor %}{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)

_DECODER: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",  # whose form this is; without one, 5.17 warns of a tokenizer
    "use_cache": True,
}
# Sizes as in config.json of Qwen/Qwen3-8B and Qwen/Qwen3-0.6B.
_QWEN3 = _DECODER | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Sizes as in config.json of meta-llama/Llama-3.1-8B.
_LLAMA = _DECODER | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": CONTEXT_TOKENS_MAX,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_8B = {"hidden_size": 4096, "num_attention_heads": 32}
_QWEN3_8B = _QWEN3 | _8B | {"intermediate_size": 12288}
_LLAMA_8B = _LLAMA | _8B | {"intermediate_size": 14336}


def _eagle3(target: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Return the draft of one layer for `target`: a Llama layer over three of its hidden states,
    with a vocabulary of its own (as the published heads: 32,000 of the target's tokens)."""
    draft = _DECODER | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    draft |= {key: target[key] for key in (*same, "rms_norm_eps", "rope_theta", "vocab_size")}
    return draft | {"draft_vocab_size": 32000, "num_hidden_layers": 1} | changed


MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3_8B | {"max_window_layers": 36, "num_hidden_layers": 36},
    "llama-3.1-8b": _LLAMA_8B | {"num_hidden_layers": 32},
    "eagle3-qwen3-8b": _eagle3(_QWEN3_8B),
    "eagle3-llama-3.1-8b": _eagle3(_LLAMA_8B),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="make_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--layers", type=int, help="of models that are no drafts")
    parser.add_argument("--weights", type=int, metavar="SEED", help="write random weights, too")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"no model is called '{unknown[0]}'; there are {', '.join(MODELS)}")
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be 1 or more")
    try:
        learned = train()
    except ImportError:
        if python := engine_python(os.environ.get("STAGE", "")):
            os.execv(python, [python, __file__, *argv])
        print(
            f"make_model: {sys.executable} has no tokenizers; use a Python that has, or unpack an "
            "engine's bundle, source its env.sh and try again",
            file=sys.stderr,
        )
        return 1
    for name in options.names or MODELS:
        folder = options.out / name
        config = shape(name, options.layers)
        write_model(folder, config, learned)
        if options.weights is not None and not _draft(config):
            write_weights(folder, config, options.weights)
        print(folder)
    return 0


def engine_python(stage: str) -> str:
    """Return the Python of an engine in this stage that has tokenizers; empty when there is none.

    It is asked to import them, not only where they lie: what it is then started for would come back
    here otherwise, for ever.
    """
    for engine in ENGINES if stage else ():
        python = str(Path(stage) / engine / "bin" / "python")
        try:
            if not subprocess.run(
                [python, "-c", "import tokenizers"], stderr=subprocess.DEVNULL, check=False
            ).returncode:
                return python
        except OSError:
            continue  # this engine was not unpacked
    return ""


def shape(name: str, layers: int | None) -> dict[str, Any]:
    """Return a model's config, with fewer layers where asked."""
    config = dict(MODELS[name])
    if layers is not None and not _draft(config):
        config["num_hidden_layers"] = layers
        if "max_window_layers" in config:
            config["max_window_layers"] = layers
    return config


def _draft(config: dict[str, Any]) -> bool:
    return "draft_vocab_size" in config


def write_model(folder: Path, config: dict[str, Any], learned: dict[str, Any]) -> None:
    """Write one folder; each file is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": PAD_ID,
            "eos_token_id": [EOS_ID],
            "pad_token_id": PAD_ID,
            "do_sample": False,
        },
        "tokenizer.json": name_every_id(learned, config["vocab_size"]),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT_TOKENS_MAX,
            "bos_token": None,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    }
    for name, value in files.items():
        new = folder / f".{name}.new"
        new.write_text(json.dumps(value, indent=None if name == "tokenizer.json" else 1))
        new.replace(folder / name)


def name_every_id(learned: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return the tokenizer with words for the ids that were not learned; no merge leads to them."""
    names = dict(learned["model"]["vocab"])
    for number in range(len(names), vocabulary):
        names[f"\u0120w{number}"] = number
    return learned | {"model": learned["model"] | {"vocab": names}}


def train() -> dict[str, Any]:
    """Learn merges from Python's own library, which is on every host in the same form."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads count words in any order
    from tokenizers import (  # noqa: PLC0415  # slow to import, and only this needs it
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_TOKENS,
        special_tokens=[PAD, EOS, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    learned = json.loads(tokenizer.to_str())
    assert isinstance(learned, dict)
    return learned


def _corpus() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py"))[:CORPUS_FILES_MAX]:
        yield path.read_text(encoding="utf-8", errors="ignore")
    yield "".join(f" {word}" for word in WORDS) * WORDS_REPEATED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
