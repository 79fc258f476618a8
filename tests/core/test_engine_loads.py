"""What engines say of themselves: figures by rank, adapters, sleep, names; and what that makes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import DP_SIZE_MAX, LoadSample, RankLoad, ReplicaRecord, with_load
from proxy.contract.engines import MODEL_NAMES_MAX, SGLANG, VLLM, Listing, read_any, read_listing
from proxy.contract.exposition import read_samples

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


VLLM_DP = golden("vllm-dp2-lora-metrics.txt")
SGLANG_DP = golden("sglang-dp2-metrics.txt")
SGLANG_DP_LOADS = golden("sglang-dp2-loads.json")


def test_vllm_tells_its_ranks_by_a_label() -> None:
    load = VLLM.read([VLLM_DP], 5.0)
    assert load is not None
    assert (load.running, load.waiting, load.kv_used_ratio) == (4, 2, 0.5)
    assert (load.kv_capacity_tokens, load.used_tokens, load.block_tokens) == (320_000, 100_000, 16)
    assert (load.prompt_tokens_total, load.cached_tokens_total) == (160_000, 30_000)
    assert (load.prefill_tokens_total, load.prefill_busy_s_total) == (127_000, 5.75)
    assert (load.waiting_tokens, load.running_max) == (0, 0)  # it does not say
    zero, one = load.ranks
    assert (zero.rank, zero.running, zero.waiting, zero.used_tokens) == (0, 3, 2, 80_000)
    assert (one.rank, one.running, one.waiting, one.used_tokens) == (1, 1, 0, 20_000)
    assert (one.kv_capacity_tokens, one.block_tokens, one.kv_used_ratio) == (160_000, 16, 0.125)
    assert (one.prefill_tokens_total, one.prefill_busy_s_total) == (29_000, 1.25)


def test_vllm_names_the_adapters_in_use_by_the_latest_of_its_series() -> None:
    load = VLLM.read([VLLM_DP], 5.0)
    assert load is not None
    assert load.busy_adapters == ("fetched", "fr", "sql")


def test_an_engine_that_sleeps_says_so() -> None:
    awake = b'sleep_state="awake"} 1.0'
    assert awake in VLLM_DP
    asleep = VLLM.read([VLLM_DP.replace(awake, b'sleep_state="awake"} 0.0')], 5.0)
    assert asleep is not None
    assert asleep.asleep
    for page in (VLLM_DP, golden("vllm-0.26.0-metrics.txt"), b"vllm:num_requests_running 1\n"):
        load = VLLM.read([page], 5.0)
        assert load is not None
        assert not load.asleep


def test_a_vllm_without_its_prefill_histograms_has_computed_what_was_not_cached() -> None:
    page = (
        b"vllm:num_requests_running 1\nvllm:prompt_tokens_total 9\nvllm:prefix_cache_hits_total 4"
    )
    load = VLLM.read([page], 5.0)
    assert load is not None
    assert (load.prefill_tokens_total, load.prefill_busy_s_total) == (5, 0.0)


def test_sglang_tells_its_ranks_in_its_metrics_too() -> None:
    """Each tensor-parallel rank repeats its figures, and those of DP rank 1 begin at number 2."""
    load = SGLANG.read([SGLANG_DP, b""], 5.0)
    assert load is not None
    assert [(r.running, r.waiting, r.used_tokens) for r in load.ranks] == [
        (5, 1, 25_000),
        (7, 0, 75_000),
    ]
    assert (load.running, load.kv_used_ratio, load.kv_capacity_tokens) == (12, 0.75, 200_000)
    assert (load.block_tokens, load.prompt_tokens_total) == (64, 10_000)
    assert load.cached_tokens_total == 4_500, "of every source"
    assert load.waiting_tokens == 0


def test_what_sglang_says_in_its_loads_wins_rank_by_rank() -> None:
    load = SGLANG.read([SGLANG_DP, SGLANG_DP_LOADS], 5.0)
    assert load is not None
    assert [r.rank for r in load.ranks] == [0, 1]
    assert [(r.running, r.waiting, r.waiting_tokens) for r in load.ranks] == [
        (4, 0, 0),
        (9, 2, 6000),
    ]
    assert [(r.prefill_tokens_total, r.prefill_busy_s_total) for r in load.ranks] == [
        (100_000, 5.0),
        (300_000, 10.0),
    ]
    assert (load.running, load.waiting_tokens, load.running_max) == (13, 6000, 256)
    assert load.kv_used_ratio == 0.8
    assert load.prompt_tokens_total == 10_000
    alone = SGLANG.read([b"", SGLANG_DP_LOADS], 5.0)
    assert alone is not None
    assert (alone.running, len(alone.ranks), alone.prompt_tokens_total) == (13, 2, 0)


def test_one_rank_is_no_choice_of_ranks() -> None:
    pages = (
        [golden("vllm-0.26.0-metrics.txt")],
        [golden("sglang-0.5.17-metrics.txt"), golden("sglang-0.5.17-loads.json")],
    )
    for answers, reader in zip(pages, (VLLM, SGLANG), strict=True):
        load = reader.read(answers, 5.0)
        assert load is not None
        assert load.ranks == ()
        assert load.block_tokens == 16
    assert load.running_max == 4096


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ((0, 1, 2), 3),
        ((1, 0), 2),
        ((1, 2), 0),  # a node of several: its ranks are not numbered for those who ask it
        ((0, 2), 0),
        ((0,), 0),
        (tuple(range(DP_SIZE_MAX)), DP_SIZE_MAX),
        (tuple(range(DP_SIZE_MAX + 1)), 0),
    ],
)
def test_ranks_are_all_of_them_or_none(ranks: tuple[int, ...], told: int) -> None:
    page = "".join(f'vllm:num_requests_running{{engine="{rank}"}} 2\n' for rank in ranks)
    load = VLLM.read([page.encode()], 5.0)
    assert load is not None
    assert (len(load.ranks), load.running) == (told, 2 * len(ranks))


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([VLLM_DP], "vllm"),
        ([SGLANG_DP, SGLANG_DP_LOADS], "sglang"),
        ([b"", SGLANG_DP_LOADS], "sglang"),
        ([b"", b'{"loads":[{"num_running_reqs":1,"token_usage":"?"}]}'], None),
        ([b"", b'{"loads":[{"dp_rank":0}]}'], None),
        ([b"doherty_requests_total 5\n", b""], None),
        ([b"", b""], None),
    ],
)
def test_the_engine_is_known_by_its_words(answers: list[bytes], kind: str | None) -> None:
    found = read_any(answers, 5.0)
    assert (found[0] if found else None) == kind


@given(st.binary(max_size=80), st.sampled_from((b"", b"\n", b"\r\n")))
def test_a_sample_is_found_wherever_it_stands(noise: bytes, end: bytes) -> None:
    page = noise.replace(b"\n", b" ") + b'\nx_total{a="b"} 3' + end
    assert read_samples(page, ["x_total"])["x_total"][-1] == ({"a": "b"}, 3.0)
    assert read_samples(b"x_total 3", ["x_total", "x"]) == {"x_total": [({}, 3.0)]}


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "listing"),
    [
        (golden("vllm-lora-models.json"), Listing(("m", "sql", "fr"), ("fr", "sql"), "vllm")),
        (golden("vllm-0.26.0-models.json"), Listing(("m",), (), "vllm")),
        (golden("sglang-0.5.17-models.json"), Listing(("m",), (), "sglang")),
        (b'{"data":[{"id":"m"},{"id":"m"}]}', Listing(("m",), None, "unknown")),
        (b'{"data":[{"id":"m","parent":[5],"owned_by":{}}]}', Listing(("m",), ("m",), "unknown")),
        (b'{"data":[]}', Listing((), None, "unknown")),
        (b'{"data":[{}]}', None),
        (b"no", None),
    ],
)
def test_a_model_list_tells_names_adapters_and_the_engine(
    body: bytes, listing: Listing | None
) -> None:
    assert read_listing(body) == listing


def test_a_model_list_without_end_is_cut() -> None:
    rows = ",".join(f'{{"id":"m{number}","parent":"m"}}' for number in range(MODEL_NAMES_MAX + 9))
    listing = read_listing(f'{{"data":[{rows}]}}'.encode())
    assert listing is not None
    assert listing.adapters is not None
    assert (len(listing.names), len(listing.adapters)) == (MODEL_NAMES_MAX, MODEL_NAMES_MAX)


# --- records -------------------------------------------------------------------------------------

BARE = ReplicaRecord(replica_id="a", url="http://a:1")


def _sample(ranks: int, **fields: object) -> LoadSample:
    told = tuple(RankLoad(rank=rank) for rank in range(ranks))
    return msgspec.structs.replace(LoadSample(at_s=1.0, ranks=told), **fields)


def test_ranks_only_grow_within_a_life() -> None:
    known = with_load(BARE, _sample(4), None, anew=True)
    assert known.dp_size == 4
    assert with_load(known, _sample(3), None, anew=False).dp_size == 4
    assert with_load(known, _sample(8), None, anew=False).dp_size == 8
    assert with_load(known, _sample(0), None, anew=True).dp_size == 1


def test_adapters_are_those_in_use_or_where_that_is_not_told_those_listed() -> None:
    used = _sample(0, busy_adapters=("sql", "x"))
    assert with_load(BARE, _sample(0), None, anew=True).adapters is None
    assert with_load(BARE, _sample(0), (), anew=True).adapters == ()
    assert with_load(BARE, used, ("fr", "sql"), anew=True).adapters == ("sql", "x")
    unused = _sample(0, busy_adapters=())
    assert with_load(BARE, unused, ("fr", "sql"), anew=True).adapters == ()
    assert with_load(BARE, _sample(0), ("fr",), anew=True).adapters == ("fr",)
    assert with_load(BARE, used, None, anew=True).adapters == ("sql", "x")


def test_a_record_keeps_what_it_says_over_the_wire() -> None:
    load = VLLM.read([VLLM_DP], 5.0)
    assert load is not None
    record = with_load(BARE, load, ("fr",), anew=True)
    again = msgspec.json.decode(msgspec.json.encode(record), type=ReplicaRecord)
    assert again == record
    assert msgspec.json.encode(BARE) == b'{"replica_id":"a","url":"http://a:1"}'
