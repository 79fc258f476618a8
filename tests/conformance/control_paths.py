"""What an engine lets its operator do over HTTP, and how a path to it may be disguised.

None of these may be reached through the proxy: they stop engines, read or replace weights, run
methods by name, drop caches. The names are those of vLLM and SGLang, with what they had in earlier
releases; a name that neither has is as good, because nothing is served that is not on a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

_BOTH: Final = (
    "/metrics /ping /load /get_load /version /server_info /get_server_info /model_info "
    "/get_model_info /docs /redoc /openapi.json /docs/oauth2-redirect /start_profile /stop_profile "
    "/v1/load_lora_adapter /v1/unload_lora_adapter /load_lora_adapter /unload_lora_adapter "
    "/generate /v1/loads /v1/realtime /health_generate /ready"
)
_VLLM: Final = (
    "/sleep /wake_up /is_sleeping /pause /resume /is_paused /abort_requests /collective_rpc "
    "/reset_prefix_cache /reset_mm_cache /reset_encoder_cache /release_kv_cache_memory "
    "/init_weight_transfer_engine /start_weight_update /start_draft_weight_update /update_weights "
    "/finish_weight_update /update_weight_version /weight_info /weight_checker /get_world_size "
    "/scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/apply /fault_tolerance/status "
    "/kv_event_sources /tokenizer_info /invocations /generative_scoring /inference/v1/generate "
    "/inference/v1/abort_requests /v1/chat/completions/render /v1/completions/render "
    "/v1/chat/completions/derender /v1/completions/derender /v1/messages/render "
    "/v1/responses/render /cohere/v2/chat"
)
_SGLANG: Final = (
    "/flush_cache /release_memory_occupation /resume_memory_occupation /abort_request "
    "/pause_generation /continue_generation /update_weights_from_disk /update_weights_from_tensor "
    "/update_weights_from_distributed /update_weights_from_ipc /init_weights_update_group "
    "/destroy_weights_update_group /get_weights_by_name /open_session /close_session /freeze_gc "
    "/set_internal_state /get_internal_state /slow_down /pd_role_switch /configure_logging "
    "/clear_hicache_storage_backend /attach_hicache_storage_backend "
    "/detach_hicache_storage_backend /start_expert_distribution_record "
    "/stop_expert_distribution_record /dump_expert_distribution_record /encode /vertex_generate "
    "/separate_reasoning /parse_function_call /gate/activate /hicache/storage-backend"
)
CONTROL_PATHS: Final = tuple(path.encode() for path in f"{_BOTH} {_VLLM} {_SGLANG}".split())

# Paths that are served, before which a way out may be tried.
_SERVED: Final = (
    b"/v1/models",
    b"/v1/chat/completions",
    b"/v1/responses",
    b"/health",
    b"/tokenize",
)
_OUT: Final = (
    b"/../..", b"/../../..", b"/%2e%2e/%2e%2e", b"/%2E%2E%2F%2E%2E", b"/..%2f..", b"/..%5c..",
    b"/.%2e/.%2e", b"/..;/..;", b"/x/../../..", b"/%252e%252e/%252e%252e", b"\\..\\..",
    b"%2f..%2f..", b"/x/cancel/../../../..", b"%00/../..", b"/.", b"/", b"//", b";", b"%2f",
    b"%3b", b"%23", b"%3f",
)  # fmt: skip


def _encoded(path: bytes) -> bytes:
    return b"".join(b"%%%02x" % octet if octet != 0x2F else b"/" for octet in path)


_SPELLINGS: Final[tuple[Callable[[bytes], bytes], ...]] = (
    lambda path: path,
    lambda path: b"/" + path,
    lambda path: b"//" + path,
    lambda path: b"/." + path,
    lambda path: b"/%2e" + path,
    lambda path: b"/.." + path,
    lambda path: b"/%2e%2e" + path,
    lambda path: b"/x/.." + path,
    lambda path: b"/%2f" + path[1:],
    lambda path: b"/%5c" + path[1:],
    lambda path: b"/\\" + path[1:],
    lambda path: b"/;" + path,
    lambda path: b"/v1" + path,
    lambda path: b"/v1/.." + path,
    lambda path: path + b"/",
    lambda path: path + b"//",
    lambda path: path + b"/.",
    lambda path: path + b"/x/..",
    lambda path: path + b"%2f",
    lambda path: path + b";x=y",
    lambda path: path + b"%00",
    lambda path: path + b"%20",
    lambda path: path + b"%0d%0aHost:%20a",
    lambda path: path + b"?level=1",
    lambda path: path + b"?/v1/models",
    lambda path: path + b"%3flevel=1",
    lambda path: path + b".json",
    lambda path: path.upper(),
    lambda path: path.title(),
    lambda path: path.replace(b"_", b"%5f").replace(b"-", b"%2d"),
    lambda path: path[:-1] + b"%%%02x" % path[-1],
    _encoded,
    lambda path: _encoded(path).replace(b"%", b"%25"),
    lambda path: _encoded(path).upper(),
    lambda path: path.replace(b"e", b"\xc4\x97"),
    lambda path: path + b"\x00",
    lambda path: path + b"#x",
    lambda path: path[1:],
    lambda path: b"http://127.0.0.1:30000" + path,
    lambda path: b"HTTP://a" + path,
    lambda path: b"http://a/" + path,
    lambda path: b"http://a@b" + path,
    lambda path: b"https://a/v1/models/../.." + path,
)


def spellings(path: bytes) -> Iterator[bytes]:
    """Return the ways to spell a control path."""
    return (spelling(path) for spelling in _SPELLINGS)


def ways_out(path: bytes) -> Iterator[bytes]:
    """Return the ways out of a served path to it."""
    for served in _SERVED:
        for out in _OUT:
            yield served + out + path
            yield served + out + path[1:]
