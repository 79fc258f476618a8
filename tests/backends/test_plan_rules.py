"""Each rule of the planner, by name, and laws of whole plans."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.plan import Plan, make_plan
from backends.planning import floors, parallel, rules
from backends.planning.compare import compare
from backends.planning.drafts import PUBLISHED, find_draft, published_draft
from backends.planning.failure import PlanError, RequestError
from backends.planning.formats import FP8, w4a16
from backends.planning.goal import DEFAULT_TARGETS, Goal, WorkClass
from backends.planning.hardware import GPUS
from backends.planning.launch import static_share
from backends.planning.reading import read_shape
from backends.planning.shape import ModelShape
from tests.fakes.model_shapes import CONFIGS

SHAPES = {name: read_shape(config) for name, config in CONFIGS.items()}
SHAPES["llama-3.3-70b-fp8"] = read_shape(
    {**CONFIGS["llama-3.3-70b"], "quantization_config": {"quant_method": "fp8"}}
)


def goal(work: WorkClass = "online", **values: Any) -> Goal:
    targets = DEFAULT_TARGETS[work]
    given: dict[str, Any] = {
        "model": "a/model",
        "concurrency": targets.concurrency,
        "token_target_s": targets.token_s,
        "first_token_target_s": targets.first_token_s,
    } | values
    return Goal(work=work, **given)


def planned(model: str, gpu: str, work: WorkClass = "online", **values: Any) -> Plan:
    return make_plan(goal(work, **values), SHAPES[model], GPUS[gpu])


def why(plan: Plan, rule: str) -> str:
    (found,) = [f"{d.choice}: {d.why}" for d in plan.decisions if d.rule == rule]
    return found


def after(plan: Plan, flag: str) -> str | None:
    return plan.args[plan.args.index(flag) + 1] if flag in plan.args else None


# engine


@pytest.mark.parametrize(
    ("work", "engine"), [("online", "sglang"), ("offline", "vllm"), ("semi-online", "vllm")]
)
def test_the_engine_follows_the_class(work: WorkClass, engine: str) -> None:
    plan = planned("llama-3.1-8b", "h200", work)
    assert plan.replica.engine == engine
    asked = planned("llama-3.1-8b", "h200", work, engine="sglang" if engine == "vllm" else "vllm")
    assert asked.replica.engine != engine
    assert "--engine" in why(asked, "engine")


def test_semi_online_weighs_the_start_and_the_snapshot() -> None:
    small, large = (
        planned("llama-3.1-8b", "h200", "semi-online"),
        planned("llama-3.1-405b", "h200", "semi-online"),
    )
    assert small.snapshot
    assert "snapshot" in why(small, "engine")
    assert not large.snapshot  # several GPUs
    assert "starts" in why(large, "engine")
    assert "snapshot" not in why(large, "engine")
    assert floors.start_s(large.replica) > floors.start_s(small.replica)


# format


@pytest.mark.parametrize(
    ("model", "gpu", "name", "shipping"),
    [
        ("llama-3.1-8b", "h100", "fp8", "at load"),
        ("llama-3.1-8b", "l40s", "fp8", "at load"),
        ("llama-3.1-8b", "b200", "fp8", "at load"),  # small models stay at eight bits
        ("llama-3.3-70b", "b200", "fp8", "at load"),  # "some 70 B" still does
        ("llama-3.1-405b", "b200", "nvfp4", "needs its checkpoint"),
        ("llama-3.1-405b", "h200", "fp8", "at load"),  # no FP4 arithmetic
        ("llama-3.1-8b", "a100", "int8", "needs its checkpoint"),
        ("llama-3.1-405b", "a100", "w4a16", "needs its checkpoint"),
        ("gpt-oss-20b", "h100", "mxfp4", "as shipped"),
        ("gpt-oss-20b", "b200", "mxfp4", "as shipped"),
        ("qwen3-235b-a22b", "b200", "fp8", "at load"),  # 22 B active, not 235
        ("deepseek-v3", "b200", "fp8", "as shipped"),
    ],
)
def test_the_format_follows_the_gpu_and_the_active_size(
    model: str, gpu: str, name: str, shipping: str
) -> None:
    precision, said = rules.choose_format(SHAPES[model], GPUS[gpu])
    assert (precision.weights.name, precision.shipping) == (name, shipping)
    assert said.rule == "format"
    assert "are not above" not in said.why
    assert said.why


def test_gpt_oss_20b_is_the_exception_below_70_b() -> None:
    _, said = rules.choose_format(SHAPES["gpt-oss-20b"], GPUS["b200"])
    assert "the exception" in said.why
    _, said = rules.choose_format(SHAPES["gpt-oss-20b"], GPUS["h100"])
    assert "widens it to 16 bits" in said.why


def test_experts_of_large_models_become_fp4_at_load() -> None:
    large = msgspec.structs.replace(SHAPES["qwen3-235b-a22b"], experts_active=64)
    assert large.parameters_active > rules.FOUR_BIT_PARAMETERS_MIN
    precision, _ = rules.choose_format(large, GPUS["b200"])
    assert (precision.weights.covers, precision.shipping) == ("experts", "at load")


def test_weights_stay_as_shipped_where_that_is_asked_for() -> None:
    plan = planned("llama-3.1-8b", "h200", as_shipped=True)
    assert plan.precision.weights.name == "bf16"
    assert "--quantization" not in plan.args
    assert not plan.replica.loads_wide
    assert "--format shipped" in why(plan, "format")


def test_sglang_needs_room_for_16_bits_to_narrow_them() -> None:
    narrowed = planned("llama-3.3-70b", "h200", token_target_s=0.010)
    assert narrowed.replica.gpus == 2
    assert "loads all 16 bits" in why(narrowed, "GPUs per replica")
    shipped = planned("llama-3.3-70b-fp8", "h200", token_target_s=0.010)
    assert shipped.replica.gpus == 1
    by_layer = planned("llama-3.3-70b", "h200", token_target_s=0.010, engine="vllm")
    assert by_layer.replica.gpus == 1
    with pytest.raises(PlanError, match=r"in 16 bits, which SGLang .*: a checkpoint in fp8"):
        planned("llama-3.3-70b", "h200", gpus_per_node=1)


def test_a_needed_checkpoint_is_noted_where_it_is_needed() -> None:
    assert "INT8" in planned("llama-3.1-8b", "a100").note
    assert planned("llama-3.1-8b", "h200").note == ""


# tensor parallelism, online


def test_online_grows_beyond_memory_until_the_target_is_met() -> None:
    easy = planned("llama-3.3-70b-fp8", "h200", token_target_s=0.010)
    hard = planned("llama-3.3-70b-fp8", "h200", token_target_s=0.0055)
    assert easy.replica.gpus == 1
    assert hard.replica.gpus == 4
    assert not hard.missed
    assert "memory needs 1 GPU" in why(hard, "GPUs per replica")
    narrower = next(c for c in hard.considered if c.replica.gpus == 2)
    assert narrower.token_s > 0.0055 >= hard.chosen.token_s


def test_online_stops_where_communication_eats_the_gain() -> None:
    plan = planned("llama-3.1-8b", "h200", token_target_s=0.0005)
    assert plan.missed
    assert plan.replica.gpus < 8
    text = why(plan, "GPUs per replica")
    assert "would take off only" in text
    times = [c.token_s for c in plan.considered]
    at = [c.replica.gpus for c in plan.considered].index(plan.replica.gpus)
    assert 1 - times[at + 1] / times[at] < parallel.GAIN_MIN


def test_online_stays_within_nvlink() -> None:
    plan = planned("qwen3-8b", "l40s", token_target_s=0.001)
    assert plan.replica.gpus == 1
    assert "PCIe" in why(plan, "GPUs per replica")


def test_a_first_token_target_adds_gpus_too() -> None:
    relaxed = planned("llama-3.3-70b-fp8", "h200", token_target_s=1.0)
    strict = planned("llama-3.3-70b-fp8", "h200", token_target_s=1.0, first_token_target_s=0.15)
    assert strict.replica.gpus > relaxed.replica.gpus
    assert strict.chosen.first_token_s <= 0.15


@pytest.mark.parametrize(
    ("model", "weights", "gpus", "said"),
    [
        ("llama-3.3-70b", FP8, 8, ""),
        ("llama-3.3-70b", FP8, 16, ""),  # each head twice
        ("llama-3.3-70b", w4a16("awq", 100_000), 1, ""),  # nothing is cut
        ("llama-3.3-70b", FP8, 3, "64 attention heads are no multiple of 3"),
        ("gpt-oss-20b", FP8, 8, ""),
        ("qwen3-235b-a22b", w4a16("awq", 128), 8, "a width of 1,536 cannot be cut into 8"),
        ("qwen3-235b-a22b", w4a16("awq", 128), 4, ""),
        ("deepseek-v3", FP8, 8, ""),
    ],
)
def test_models_are_cut_only_where_they_can_be(
    model: str, weights: Any, gpus: int, said: str
) -> None:
    found = parallel.splits(SHAPES[model], weights, gpus)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_key_value_heads_must_match_too() -> None:
    odd = msgspec.structs.replace(SHAPES["llama-3.3-70b"], kv_heads=6, query_heads=48)
    assert "6 key-value heads" in parallel.splits(odd, FP8, 4)
    latent = msgspec.structs.replace(SHAPES["deepseek-v3"], kv_heads=6)
    assert parallel.splits(latent, FP8, 4) == ""


# offline


def test_offline_takes_the_fewest_gpus_that_hold_a_saturating_batch() -> None:
    small = planned("llama-3.1-8b", "h200", "offline")
    large = planned("llama-3.1-405b", "b200", "offline")
    assert (small.replica.gpus, small.replicas) == (1, 8)
    assert (large.replica.gpus, large.replicas) == (4, 2)  # two hold the weights, not the batch
    wanted = floors.crossover_batch(large.replica)
    fewer = next(c for c in large.considered if c.replica.gpus == 2)
    assert fewer.fits
    assert fewer.batch_max < wanted <= large.chosen.batch_max
    assert "the fewest that hold a saturating batch" in why(large, "GPUs per replica")
    assert not large.missed  # it has no targets


def test_offline_takes_fewer_where_they_yield_more_for_each() -> None:
    plan = planned("llama-3.1-8b", "l40s", "offline")
    assert plan.replica.gpus == 1
    assert plan.chosen.batch_max < floors.crossover_batch(plan.replica)
    assert "4 GPUs would hold them, but yield" in why(plan, "GPUs per replica")
    wide = next(c for c in plan.considered if c.replica.gpus == 4)
    assert wide.tokens_per_s / 4 < plan.chosen.tokens_per_s


def test_offline_takes_the_best_yield_where_nothing_holds_one() -> None:
    plan = planned("llama-3.1-405b", "h100", "offline", prompt_tokens=20_000)
    assert "no number in a node" in why(plan, "GPUs per replica")
    each = {c.replica.gpus: c.tokens_per_s / c.replica.gpus for c in plan.considered if c.fits}
    assert each[plan.replica.gpus] == max(each.values())


def test_offline_mixes_chunks_with_a_large_budget() -> None:
    plan = planned("llama-3.1-8b", "a100", "offline")
    assert {"--async-scheduling", "--enable-chunked-prefill"} <= set(plan.args)
    assert after(plan, "--max-num-batched-tokens") == "16384"
    assert plan.replica.draft is None
    assert "leaves idle" in why(plan, "speculation")


def test_offline_names_what_is_cheaper_by_its_own_figures() -> None:
    plan = planned("llama-3.3-70b", "h100", "offline")
    assert [other.flags for other in plan.cheaper] == [
        "--engine sglang --draft auto",
        "--draft auto",
        "--engine sglang",
    ]
    for other in plan.cheaper:
        flags = dict(zip(*[iter(other.flags.split())] * 2, strict=True))
        asked = {name.removeprefix("--"): value for name, value in flags.items()}
        cost = planned("llama-3.3-70b", "h100", "offline", **asked).cost
        assert cost.gpu_s_per_million == other.gpu_s_per_million < plan.cost.gpu_s_per_million
    # With prefill wholly mixed in, arithmetic bounds this one, and no draft shortens that.
    drafting = next(other for other in plan.cheaper if other.flags == "--draft auto")
    assert drafting.mixed_gpu_s_per_million == pytest.approx(
        plan.cost.mixed_gpu_s_per_million, rel=0.01
    )
    assert plan.cost.mixed_gpu_s_per_million < plan.cost.gpu_s_per_million
    settled = planned("llama-3.3-70b", "h100", "offline", engine="sglang", draft="auto")
    assert settled.cheaper == ()
    assert planned("llama-3.3-70b", "h100").cheaper == ()  # its targets decide online


def test_offline_takes_a_draft_that_is_asked_for_and_weighs_it() -> None:
    plan = planned("qwen3-8b", "h100", "offline", draft="/drafts/mine", accept_length=2.0)
    assert plan.replica.draft is not None
    assert "/drafts/mine" in str(after(plan, "--speculative-config"))
    assert not plan.snapshot
    said = why(plan, "speculation")
    assert "off the GPU-seconds of a token" in said
    plain = planned("qwen3-8b", "h100", "offline")
    share = 1 - plan.cost.gpu_s_per_million / plain.cost.gpu_s_per_million
    assert f"; {share:.0%} off" in said
    bad = planned("qwen3-8b", "h100", "offline", draft="/drafts/bad", accept_length=1.0)
    assert bad.replica.draft is None
    assert "/drafts/bad adds" in why(bad, "speculation")
    assert "asked for" in why(planned("qwen3-8b", "h100", "offline", draft="none"), "speculation")


def test_offline_keeps_compressed_attention_whole() -> None:
    plan = planned("deepseek-v3", "h200", "offline")
    assert plan.replica.attention_groups == 8
    assert (after(plan, "--tensor-parallel-size"), after(plan, "--data-parallel-size")) == (
        "1",
        "8",
    )
    assert int(after(plan, "--max-num-seqs") or 0) == -(-plan.limits.most // 8)
    assert planned("deepseek-v3", "h200", "online").replica.attention_groups == 1
    ours = planned("deepseek-v3", "h200", "offline", engine="sglang")
    assert (after(ours, "--tensor-parallel-size"), after(ours, "--attn-dp-size")) == ("8", "8")


# speculation


def test_a_published_draft_is_used_online_with_its_length() -> None:
    plan = planned("gpt-oss-120b", "h200", concurrency=1)
    assert plan.replica.draft is not None
    assert plan.replica.draft.accept_length == 2.1
    assert after(plan, "--speculative-algorithm") == "EAGLE3"
    assert after(plan, "--speculative-num-draft-tokens") == "4"
    assert "positions accepted" in why(plan, "speculation")


def test_a_draft_found_by_size_alone_is_doubted() -> None:
    by_size = find_draft(SHAPES["qwen3-8b"], "/models/x", "", 0.0)
    by_name = find_draft(SHAPES["qwen3-8b"], "Qwen/Qwen3-8B", "", 0.0)
    assert by_size is not None
    assert by_name is not None
    assert "make sure" in by_size.source
    assert "make sure" not in by_name.source


def test_every_published_draft_is_found_by_its_model() -> None:
    for name, shape in SHAPES.items():
        known = published_draft(shape)
        assert known is None or known.model == name.removesuffix("-fp8")
    assert len({d.draft for d in PUBLISHED}) == len(PUBLISHED)
    assert all(1 < d.accept_length <= 4 for d in PUBLISHED)


def test_the_user_has_the_last_word_on_drafts() -> None:
    mine = planned("llama-3.1-8b", "h200", draft="/drafts/mine", accept_length=3.5)
    assert after(mine, "--speculative-draft-model-path") == "/drafts/mine"
    assert mine.replica.draft is not None
    assert mine.replica.draft.accept_length == 3.5
    none = planned("llama-3.1-8b", "h200", draft="none")
    assert none.replica.draft is None
    assert none.chosen.token_s > mine.chosen.token_s
    assert after(mine, "--speculative-draft-model-quantization") == "unquant"
    unknown = planned("llama-3.1-405b", "b200")
    assert "no draft is known" in why(unknown, "speculation")


def test_no_step_yields_more_than_its_own_token_and_those_proposed() -> None:
    most = planned("llama-3.1-8b", "h200", draft="/drafts/mine", accept_length=4.0)
    assert most.replica.draft is not None
    for model, length in (("llama-3.1-8b", 4.1), ("deepseek-v3", 2.1), ("llama-3.1-8b", 0.9)):
        with pytest.raises(RequestError, match=r"at least 1 token and at most [24], its own"):
            planned(model, "h200", accept_length=length)
    with pytest.raises(RequestError, match="at most 4"):  # not as if it did not fit
        compare(goal(accept_length=9.0), SHAPES["llama-3.1-8b"], tuple(GPUS.values()))


def test_a_node_of_more_gpus_than_a_board_has_more_replicas() -> None:
    plan = planned("qwen3-8b", "h100", gpus_per_node=16)
    assert plan.replicas * plan.replica.gpus == 16
    assert "a replica has at most 8" in why(plan, "replicas per node")


@pytest.mark.parametrize("work", ["online", "semi-online", "offline"])
def test_the_known_draft_can_be_asked_for_in_every_class(work: WorkClass) -> None:
    known = planned("llama-3.1-8b", "h200", work, draft="auto", concurrency=1).replica.draft
    assert known is not None
    assert known.name == "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3"
    own = planned("deepseek-v3", "h200", work, draft="auto", concurrency=1).replica.draft
    assert own is not None
    assert (own.name, own.tokens) == ("", 1)
    none = planned("llama-3.1-405b", "b200", work, draft="auto", concurrency=1)
    assert none.replica.draft is None
    assert "no draft is known" in why(none, "speculation")


def test_a_draft_that_does_not_pay_is_dropped() -> None:
    plan = planned("llama-3.1-8b", "h200", draft="/drafts/bad", accept_length=1.0)
    assert plan.replica.draft is None
    assert "adds" in why(plan, "speculation")


def test_a_model_that_drafts_itself_does() -> None:
    plan = planned("deepseek-v3", "h200")
    assert after(plan, "--speculative-algorithm") == "NEXTN"
    assert "1 proposed token is checked" in why(plan, "speculation")
    assert "--speculative-draft-model-path" not in plan.args
    theirs = planned("deepseek-v3", "h200", engine="vllm")
    assert after(theirs, "--speculative-config") == '{"method":"mtp","num_speculative_tokens":1}'


def test_semi_online_does_not_speculate_unless_told() -> None:
    assert planned("llama-3.1-8b", "h200", "semi-online").replica.draft is None
    told = planned("llama-3.1-8b", "h200", "semi-online", draft="/d", concurrency=1)
    assert told.replica.draft is not None
    assert not told.snapshot


# cache, scheduling, limits


def test_the_cache_is_narrowed_only_where_it_must_be_or_may_be() -> None:
    assert "16 bits" in why(planned("llama-3.1-8b", "h200"), "kv cache")
    asked = planned("llama-3.1-8b", "h200", kv_fp8=True)
    assert after(asked, "--kv-cache-dtype") == "fp8_e4m3"
    long = {"prompt_tokens": 120_000, "gpus_per_node": 1, "concurrency": 6}
    needed = planned("llama-3.1-8b", "h100", **long)
    assert after(needed, "--kv-cache-dtype") == "fp8_e4m3"
    assert "do not fit" in why(needed, "kv cache")
    assert "Ampere" in why(planned("llama-3.1-8b", "a100", kv_fp8=True), "kv cache")


def test_overlap_is_left_on() -> None:
    plan = planned("llama-3.1-8b", "h200")
    assert "overlap" in why(plan, "scheduling")
    assert not [arg for arg in plan.args if "disable" in arg]


def test_chunks_are_cut_so_that_streams_do_not_wait() -> None:
    fast, slow = planned("qwen3-8b", "h200"), planned("llama-3.1-405b", "h200")
    assert fast.limits.step_tokens > slow.limits.step_tokens
    took_s = floors.prefill(fast.replica, fast.limits.step_tokens)[1]
    assert took_s <= (fast.goal.first_token_target_s or 0) / 2


def test_the_aim_leaves_room_for_a_burst_and_meets_the_target() -> None:
    plan = planned("llama-3.1-8b", "h200", "semi-online")
    assert plan.limits.aim * 2 == plan.limits.most
    seen = floors.token_time(plan.replica, plan.limits.aim, plan.goal.decode_context_tokens)
    assert seen.expected_s <= (plan.goal.token_target_s or 0)


def test_the_aim_is_what_was_asked_for_or_more() -> None:
    asked = planned("qwen3-8b", "h100", concurrency=180, token_target_s=0.050)
    assert not asked.missed
    assert asked.limits.aim == 180 < asked.limits.most < 360
    assert f"room for {asked.limits.most - 180} more" in why(asked, "requests in flight")
    many = planned("qwen3-8b", "b300", concurrency=300, token_target_s=0.050)
    assert many.limits.aim == 300 <= many.limits.most
    few = planned("qwen3-8b", "h100", concurrency=8, token_target_s=0.050)
    assert few.limits.aim == (few.chosen.batch_max + 1) // 2
    assert "8 were asked for" in why(few, "requests in flight")


def test_the_context_is_cut_to_what_the_cache_holds() -> None:
    tight = planned("llama-3.3-70b-fp8", "h200", gpus_per_node=1, concurrency=1, draft="none")
    whole = planned("llama-3.3-70b-fp8", "h200", gpus_per_node=2, concurrency=1, draft="none")
    assert tight.limits.context_tokens <= whole.limits.context_tokens == 131_072
    narrow = planned("llama-3.3-70b-fp8", "h100", gpus_per_node=1, concurrency=1, kv_fp8=True)
    assert narrow.limits.context_tokens < 131_072
    assert narrow.limits.context_tokens % 1024 == 0
    assert "the cache holds one sequence" in why(narrow, "context")
    asked = planned("llama-3.1-8b", "h200", context_tokens=9000)
    assert after(asked, "--context-length") == "9000"


def test_sglang_is_given_weights_and_cache_alone() -> None:
    plan = planned("llama-3.1-8b", "h200")
    share = static_share(plan.replica)
    assert share < plan.replica.memory_share
    kept = share * plan.gpu.memory_bytes + floors.reserve_per_gpu(plan.replica)
    assert kept <= plan.replica.memory_share * plan.gpu.memory_bytes
    assert after(plan, "--mem-fraction-static") == f"{share:g}"


@pytest.mark.parametrize("draft", ["none", "auto"])
@pytest.mark.parametrize("gpu", ["l40s", "h100", "b300"])
def test_sglang_is_given_what_the_budget_counts(draft: str, gpu: str) -> None:
    replica = planned("qwen3-8b", gpu, draft=draft, concurrency=1).replica
    beside = floors.draft_bytes(replica) / replica.gpus
    counted = floors.weights_per_gpu(replica) - beside + floors.kv_room_per_gpu(replica)
    given = static_share(replica) * replica.gpu.memory_bytes
    assert 0 <= counted - given < 0.001 * replica.gpu.memory_bytes


# what cannot be


def test_a_missed_target_names_what_would_meet_it() -> None:
    plan = planned("qwen3-235b-a22b", "h100", draft="none", token_target_s=0.0099)
    assert len(plan.missed) == 1
    assert "at batch 8" in plan.missed[0]
    kinds = " | ".join(plan.remedies)
    assert "at once instead of 8" in kinds
    assert "a draft that yields" in kinds
    assert "x gb200 a replica" in kinds
    assert plan.limits.aim >= plan.goal.concurrency
    hopeless = planned("llama-3.3-70b", "h200", token_target_s=0.0001)
    assert hopeless.remedies == ("nothing in the table of GPUs would; ask for less",)
    assert "even the floor is" in hopeless.missed[0]


def test_a_first_token_alone_can_be_missed() -> None:
    plan = planned("llama-3.1-8b", "l40s", token_target_s=None, first_token_target_s=0.02)
    (missed,) = plan.missed
    assert missed.startswith("time to first token")
    assert "2,048 tokens of which none is cached" in missed
    assert any("h100 a replica" in remedy for remedy in plan.remedies)


def test_more_gpus_are_named_where_the_gain_was_thought_too_small() -> None:
    plan = planned("llama-3.1-8b", "h200", draft="none", token_target_s=0.00273, concurrency=1)
    assert plan.missed
    assert plan.replica.gpus < 8
    assert any("GPUs a replica, though" in remedy for remedy in plan.remedies)


def test_a_narrower_format_is_named_where_it_would_do() -> None:
    plan = planned("llama-3.3-70b", "b200", draft="none", token_target_s=0.0076)
    assert plan.missed
    assert any("nvfp4, if its quality bears it" in remedy for remedy in plan.remedies)


@pytest.mark.parametrize(
    ("model", "gpu", "values", "said"),
    [
        ("deepseek-v3", "h100", {}, "the weights in fp8 do not fit 8 GPUs"),
        ("deepseek-v3", "h100", {}, "it would fit: 8 x h200"),
        ("llama-3.1-405b", "l40s", {}, "a checkpoint in w4a16"),
        ("llama-3.1-8b", "h100", {"concurrency": 9000}, "lower --concurrency or --context"),
        ("llama-3.1-8b", "h100", {"context_tokens": 200_000}, "the model takes 131,072 tokens"),
        ("llama-3.1-8b", "h100", {"prompt_tokens": 200_000}, "lower --prompt-tokens or --answer-"),
        ("deepseek-v3", "h100", {"gpus_per_node": 16}, "a replica has at most 8, those of one"),
        (
            "llama-3.1-8b",
            "h100",
            {"concurrency": 9000, "gpus_per_node": 16},
            "8 x h100 (a replica has at most 8",
        ),
    ],
)
def test_what_fits_no_node_says_what_would(
    model: str, gpu: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        planned(model, gpu, **values)
    assert said in str(caught.value)


def test_a_model_that_cannot_be_cut_is_refused_by_its_heads() -> None:
    odd = msgspec.structs.replace(SHAPES["llama-3.1-405b"], query_heads=127)
    with pytest.raises(PlanError, match="do not fit 1 GPU"):
        make_plan(goal(), odd, GPUS["h200"])


# several GPU types


def test_prices_rank_offline_and_their_lack_is_told() -> None:
    types = tuple(GPUS.values())
    without = compare(goal("offline"), SHAPES["llama-3.1-8b"], types)
    assert "--price" in without.rule
    assert without.best.gpu.name in {"gb200", "b300"}
    prices = dict.fromkeys(GPUS, 10.0) | {"l40s": 0.1}
    priced = compare(goal("offline", prices_per_hour=prices), SHAPES["llama-3.1-8b"], types)
    assert priced.best.gpu.name == "l40s"
    cost = priced.best.cost
    assert cost.price_per_million == pytest.approx(cost.gpu_s_per_million * 0.1 / 3600)


def test_types_without_a_price_come_after_those_with_one() -> None:
    prices = {"h100": 2.0, "l40s": 90.0}
    found = compare(
        goal("offline", prices_per_hour=prices), SHAPES["qwen3-8b"], tuple(GPUS.values())
    )
    names = [plan.gpu.name for plan in found.plans]
    assert names[:2] == ["h100", "l40s"]
    seconds = [plan.cost.gpu_s_per_million for plan in found.plans[2:]]
    assert seconds == sorted(seconds)
    assert "no price for a100, h200, b200, gb200, b300: these come after" in found.rule
    other = compare(goal("offline", prices_per_hour=prices), SHAPES["qwen3-8b"], (GPUS["a100"],))
    assert "as if a second of each cost the same" in other.rule


def test_semi_online_prefers_what_is_easy_to_get() -> None:
    found = compare(goal("semi-online"), SHAPES["llama-3.1-8b"], tuple(GPUS.values()))
    assert found.best.gpu.name == "h200"
    scarce = [plan.gpu.scarce for plan in found.plans]
    assert scarce == sorted(scarce)


def test_online_prefers_what_meets_the_targets() -> None:
    prices = dict.fromkeys(GPUS, 10.0) | {"l40s": 0.01}
    asked = goal(prices_per_hour=prices, token_target_s=0.0055)
    found = compare(asked, SHAPES["llama-3.1-8b"], tuple(GPUS.values()))
    assert not found.best.missed
    missed = [bool(plan.missed) for plan in found.plans]
    assert missed == sorted(missed)
    assert missed[-1]


def test_types_on_which_nothing_fits_are_told() -> None:
    found = compare(goal(), SHAPES["deepseek-v3"], tuple(GPUS.values()))
    assert {name for name, _ in found.refused} == {"a100", "l40s", "h100"}
    with pytest.raises(PlanError, match="fits none of them"):
        compare(goal(), SHAPES["deepseek-v3"], (GPUS["a100"], GPUS["l40s"]))


# laws


@st.composite
def goals(draw: st.DrawFn) -> Goal:
    work: WorkClass = draw(st.sampled_from(("online", "offline", "semi-online")))
    target_s = draw(st.floats(1e-4, 0.1))
    return goal(
        work,
        gpus_per_node=draw(st.integers(1, 16)),
        prompt_tokens=draw(st.integers(1, 30_000)),
        concurrency=draw(st.integers(1, 300)),
        token_target_s=None if work == "offline" else target_s,
    )


def planned_or_none(asked: Goal, shape: ModelShape, gpu: str) -> Plan | None:
    try:
        return make_plan(asked, shape, GPUS[gpu])
    except RequestError:
        assert asked.sequence_tokens > shape.context_tokens_max
        return None
    except PlanError as error:
        if "; it would fit: " not in str(error):
            raise
        return None


@given(asked=goals(), model=st.sampled_from(sorted(SHAPES)), gpu=st.sampled_from(sorted(GPUS)))
def test_a_plan_stays_within_its_node_and_its_memory(asked: Goal, model: str, gpu: str) -> None:
    shape = SHAPES[model]
    plan = planned_or_none(asked, shape, gpu)
    if plan is None:
        return
    replica, limits = plan.replica, plan.limits
    assert 1 <= plan.replicas * replica.gpus <= asked.gpus_per_node
    assert parallel.splits(shape, replica.weights, replica.gpus) == ""
    each = floors.sequence_bytes_per_gpu(replica, asked.sequence_tokens)
    held = floors.weights_per_gpu(replica) + floors.reserve_per_gpu(replica) + limits.most * each
    assert held <= replica.gpu.memory_bytes * replica.memory_share
    assert min(asked.concurrency, limits.most) <= limits.aim <= limits.most or not limits.aim
    assert bool(limits.aim) == (asked.token_target_s is not None)
    assert asked.sequence_tokens <= limits.context_tokens <= shape.context_tokens_max
    assert bool(plan.missed) == (not parallel.meets(asked, plan.chosen))
    assert bool(plan.remedies) == bool(plan.missed)


@given(model=st.sampled_from(sorted(SHAPES)), target_ms=st.floats(0.5, 50))
def test_a_laxer_target_never_takes_more_gpus(model: str, target_ms: float) -> None:
    strict = planned(model, "b300", token_target_s=target_ms / 1e3)
    lax = planned(model, "b300", token_target_s=2 * target_ms / 1e3)
    assert lax.replica.gpus <= strict.replica.gpus
