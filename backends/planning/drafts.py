"""EAGLE-3 heads that are published, and how many tokens a step yields with them.

A head fits one model only. It is looked up by the model's name and proven by its sizes, since a
local folder may be called anything: a head for another model of the same sizes still answers right
(every token is verified), but accepts less. The lengths are published ones of chain drafts and
depend on the text; what an engine reports of its own traffic (`vllm:spec_decode_*`,
`sglang:spec_accept_length`) replaces them by `--accept-length`.
"""

from __future__ import annotations

import msgspec

from backends.planning.failure import RequestError
from backends.planning.floors import Draft
from backends.planning.shape import ModelShape

CHAIN_TOKENS = 3  # of a chain: the depth that both engines' references use
UNKNOWN_LENGTH = 2.5  # of a chain of three whose length nobody told: the middle of those below


class PublishedDraft(msgspec.Struct, frozen=True):
    model: str  # what the model's name contains
    layers: int
    hidden: int
    vocabulary: int
    experts: int
    draft: str
    accept_length: float
    source: str


PUBLISHED = (
    PublishedDraft(
        *("llama-3.1-8b", 32, 4096, 128256, 0),
        "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
        2.8,
        "2.8 to 3.5 published, with chains of up to seven; the lowest is taken",
    ),
    PublishedDraft(
        *("llama-3.3-70b", 80, 8192, 128256, 0),
        "lmsys/SGLang-EAGLE3-Llama-3.3-70B-Instruct-SpecForge",
        2.9,
        "2.9 to 3.6 published for heads of this model; the lowest is taken",
    ),
    PublishedDraft(
        *("llama-4-maverick", 48, 5120, 202048, 128),
        "lmsys/sglang-EAGLE3-Llama-4-Maverick-17B-128E-Instruct-v1",
        2.45,
        "its model card, with three steps",
    ),
    PublishedDraft(
        *("qwen3-8b", 36, 4096, 151936, 0),
        "RedHatAI/Qwen3-8B-speculator.eagle3",
        2.0,
        "1.8 to 2.2 published for heads of Qwen3 models; the middle is taken",
    ),
    PublishedDraft(
        *("qwen3-32b", 64, 5120, 151936, 0),
        "RedHatAI/Qwen3-32B-speculator.eagle3",
        2.0,
        "1.8 to 2.2 published for heads of Qwen3 models; the middle is taken",
    ),
    PublishedDraft(
        *("qwen3-30b-a3b", 48, 2048, 151936, 128),
        "RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.eagle3",
        2.0,
        "1.8 to 2.2 published for heads of Qwen3 models; the middle is taken",
    ),
    PublishedDraft(
        *("qwen3-235b-a22b", 94, 4096, 151936, 128),
        "nvidia/Qwen3-235B-A22B-Eagle3",
        2.0,
        "1.8 to 2.2 published for heads of Qwen3 models; the middle is taken",
    ),
    PublishedDraft(
        *("gpt-oss-20b", 24, 2880, 201088, 32),
        "RedHatAI/gpt-oss-20b-speculator.eagle3",
        2.1,
        "as published for gpt-oss-120b (positions accepted .58, .31, .16, .08)",
    ),
    PublishedDraft(
        *("gpt-oss-120b", 36, 2880, 201088, 128),
        "nvidia/gpt-oss-120b-Eagle3-short-context",
        2.1,
        "published: positions accepted .58, .31, .16, .08",
    ),
)


def check_length(accept_length: float, tokens: int) -> None:
    """Refuse what no step can yield: its own token, and those proposed. Raises `RequestError`."""
    if not 1 <= accept_length <= tokens + 1:
        raise RequestError(
            f"--accept-length {accept_length:g}: a step yields at least 1 token and at most "
            f"{tokens + 1}, its own and the {tokens} proposed"
        )


def published_draft(shape: ModelShape) -> PublishedDraft | None:
    """Return the head that is known for a model of these sizes."""
    sizes = (shape.layers, shape.hidden, shape.vocabulary, shape.experts)
    found = (d for d in PUBLISHED if (d.layers, d.hidden, d.vocabulary, d.experts) == sizes)
    return next(found, None)


def find_draft(shape: ModelShape, model: str, given: str, accept_length: float) -> Draft | None:
    """Return the draft to use: the one given, the model's own layers, or a published head."""
    known = published_draft(shape)
    if given == "none":
        return None
    own = given in ("", "auto")
    tokens = 1 if own and shape.drafting_layers else CHAIN_TOKENS
    if accept_length and (not own or shape.drafting_layers or known):
        check_length(accept_length, tokens)
    if not own:
        length = accept_length or (known.accept_length if known else UNKNOWN_LENGTH)
        source = "given" if accept_length else "assumed for a chain of three"
        if known and given == known.draft and not accept_length:
            source = known.source
        return Draft(name=given, tokens=tokens, accept_length=length, source=source)
    if shape.drafting_layers:
        source = "DeepSeek-V3 technical report: the second token is accepted in 85 to 90 %"
        length = accept_length or 1.85
        return Draft(name="", tokens=tokens, accept_length=length, source=source)
    if known is None:
        return None
    source = known.source
    if known.model not in model.lower():
        source += f"; the sizes are those of {known.model}: make sure that it is that model"
    length = accept_length or known.accept_length
    return Draft(name=known.draft, tokens=tokens, accept_length=length, source=source)
