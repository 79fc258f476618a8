"""What an engine reads from disk while it starts: models, and the caches of what was compiled.

Variables and defaults are the engines' own: vLLM's `envs.py`, SGLang's `environ.py`, and those of
torch, Triton, FlashInfer and the CUDA driver, which both of them use.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from backends.engines.base import option
from backends.spec import ReplicaSpec

_COMMON_CACHES = (
    ("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_{user}"),  # noqa: S108  # torch's own default
    ("TRITON_CACHE_DIR", "~/.triton/cache"),
    ("FLASHINFER_WORKSPACE_BASE", "~/.cache/flashinfer"),
    ("CUDA_CACHE_PATH", "~/.nv/ComputeCache"),
)
CACHES = {
    "vllm": (("VLLM_CACHE_ROOT", "~/.cache/vllm"), *_COMMON_CACHES),
    "vllm-jobs": (("VLLM_CACHE_ROOT", "~/.cache/vllm"), *_COMMON_CACHES),
    "sglang": (
        ("SGLANG_CACHE_DIR", "~/.cache/sglang"),
        ("SGLANG_DG_CACHE_DIR", "~/.cache/deep_gemm"),
        ("SGLANG_JIT_CACHE_DIR", ""),
        *_COMMON_CACHES,
    ),
}
_DRAFT_FLAGS = ("--speculative-draft-model-path", "--speculative-draft-model")


class _Speculation(msgspec.Struct):
    """The part of vLLM's `--speculative-config` that names a model."""

    model: str = ""


def models_read(spec: ReplicaSpec) -> tuple[str, ...]:
    """Return the models and adapters that it loads, as folders or hub ids; no dummy weights."""
    if spec.engine not in CACHES or option(spec.args, "--load-format") == "dummy":
        return ()
    drafts = (option(spec.args, *_DRAFT_FLAGS), _speculative_model(spec.args))
    named = (spec.model_path or spec.model, *drafts, *spec.adapters.values())
    return tuple(dict.fromkeys(name for name in named if name))


def caches_read(spec: ReplicaSpec, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the folders of compiled things, which need not exist."""
    home, user = environ.get("HOME", ""), environ.get("USER", "root")
    folders = []
    for variable, usual in CACHES.get(spec.engine, ()):
        folder = environ.get(variable) or usual.replace("{user}", user)
        if folder.startswith("~/"):
            folder = home + folder[1:] if home else ""
        folders.append(folder)
    return tuple(dict.fromkeys(folder for folder in folders if folder))


def _speculative_model(args: tuple[str, ...]) -> str:
    text = option(args, "--speculative-config")
    try:
        return msgspec.json.decode(text or "{}", type=_Speculation).model
    except msgspec.MsgspecError:
        return ""
