"""What is known of each bundle by name: how it is run, where it caches, what may stay behind.

What stays behind is what a dense model in bf16 or with FP8 weights, with heads of 128, never loads
on one architecture. Kept on purpose: `cutlass_scaled_mm` and the quantisation kernels of vLLM's
`_C`, `fp8_scaled_mm` of sgl-kernel's `common_ops` and sgl-deep-gemm (FP8 weights on Hopper), all of
speculative decoding, custom all-reduce, and what either engine compiles from at run time.
`--full` leaves nothing behind; for another architecture only what no engine reads stays behind.
What is missing and asked for all the same fails by its name: a missing module, an operator that is
not registered, "no kernel image is available".
"""

from __future__ import annotations

from typing import NamedTuple


class Leave(NamedTuple):
    """Files that stay behind; `pattern` as of fnmatch, where `*` passes slashes, too."""

    pattern: str
    why: str


class Slim(NamedTuple):
    """A library whose GPU code for other chips is blanked; `attention`: by head, too."""

    pattern: str
    attention: bool = False


class Kind(NamedTuple):
    """One bundle: `program` runs `main` of `module` with `env` where nothing else is set."""

    package: str
    program: str
    module: str
    env: dict[str, str]
    caches: dict[str, str]  # variable → folder below the bundle's cache folder
    cuda_libraries: bool = False  # the libraries of the CUDA toolkit go on the loader's path
    leave: tuple[Leave, ...] = ()
    slim: tuple[Slim, ...] = ()
    arch: int = 0  # the rules are for this compute capability (90: 9.0) and no other; 0: any


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}

EVERYWHERE = (
    Leave("*.pyi", "type stubs"),
    Leave("*.a", "static libraries"),
    Leave("bin/*", "programs of packages; the host runs modules"),
    Leave("*/swagger-ui*", "pages of documentation"),
    Leave("pycountry/locales/*", "names of countries in other languages"),
    Leave("mistral_common/data/*", "tokenizers of Mistral models"),
    Leave("tvm_ffi/3rdparty/libbacktrace/*", "sources of a library that is there in machine code"),
    Leave("*/licenses/ThirdParty*", "licences of what is not carried"),
)

KINDS: dict[str, Kind] = {
    "vllm": Kind(
        package="vllm",
        program="vllm",
        module="vllm.entrypoints.cli.main",
        env=OFFLINE | {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"},
        caches={
            "VLLM_CACHE_ROOT": "vllm",
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
        },
        leave=(
            Leave("vllm/vllm_flash_attn/_vllm_fa2_C*", "FlashAttention 2; Hopper has 3"),
            Leave("vllm/_moe_C*", "mixture of experts"),
            Leave("vllm/_qutlass_C*", "FP4 of Blackwell"),
            Leave("vllm/_flashmla*", "latent attention"),
            Leave("vllm/vllm-rs", "the front end in Rust, which is off by default"),
            Leave("vllm/third_party/fmha_sm100/*", "attention of Blackwell"),
            Leave(
                "vllm/third_party/deep_gemm/*", "FP8 in blocks; per-tensor FP8 needs CUTLASS alone"
            ),
            Leave("vllm/third_party/tml_fa4/*", "FlashAttention 4 of Blackwell"),
            Leave("vllm/*.h", "headers; nothing is built from them here"),
            Leave("vllm/*.hpp", "headers; nothing is built from them here"),
            Leave("vllm/*.cuh", "headers; nothing is built from them here"),
            Leave("vllm/*.cu", "sources; nothing is built from them here"),
        ),
        slim=(Slim("vllm/_C_stable_libtorch.abi3.so"), Slim("vllm/_C.abi3.so")),
        arch=90,
    ),
    "sglang": Kind(
        package="sglang",
        program="sglang",
        module="sglang.cli.main",
        env=OFFLINE,
        caches={
            "SGLANG_CACHE_DIR": "sgl",
            "TRITON_CACHE_DIR": "triton",
            "TVM_FFI_CACHE_DIR": "tvm",
            "FLASHINFER_WORKSPACE_BASE": "flashinfer",
            "SGLANG_DG_CACHE_DIR": "deep_gemm",
        },
        cuda_libraries=True,  # the memory saver preloads a library that needs libcudart
        leave=(
            Leave("sgl_kernel/flashmla_ops*", "latent attention"),
            Leave("sgl_kernel/infllm_ops*", "sparse attention of one model family"),
            Leave("sgl_kernel/sm100/*", "Blackwell"),
            Leave("torchao/*.so", "quantisation by torchao"),
            Leave("sglang/multimodal_gen/*", "models of pictures and sound"),
            Leave("sglang/test/*", "tests"),
            Leave("sglang/srt/multimodal/_core*", "pictures and sound"),
            Leave("sglang/srt/server/_core*", "the server in Rust, only with SGLANG_RUST_SERVER"),
            Leave("sglang/srt/grpc/_core*", "gRPC, only with --grpc-port"),
            Leave("Cryptodome/SelfTest/*", "tests"),
            Leave("jedi/third_party/*", "completion at a prompt"),
            Leave("flashinfer/data/cutlass/examples/*", "examples"),
            Leave("flashinfer/data/cutlass/python/*", "the generator of CUTLASS; its headers stay"),
            Leave("flashinfer/data/cccl/python/*", "Python of CCCL; its headers stay"),
        ),
        slim=(
            Slim("sgl_kernel/sm90/common_ops.abi3.so"),
            Slim("sgl_kernel/flash_ops.abi3.so", attention=True),
        ),
        arch=90,
    ),
    "doherty": Kind(
        package="doherty",
        program="doherty",
        module="backends.cli",
        env={"PYTHONUNBUFFERED": "1"},
        caches={},
    ),
}


def attention_drop(heads: tuple[int, ...], *, keep_fp8: bool, keep_fp16: bool) -> str:
    """Return the pattern of FlashAttention 3 kernels that are not wanted, by their mangled names.

    `FlashAttnFwdSm90<CollectiveMainloopFwdSm90<..., head, element, float, ...>>`: the size of the
    head of the values stands last before the element (`ELi128ENS_10bfloat16_tEf`). Kernels for the
    8.x cards lie in the same library under another name.
    """
    elements = ["10bfloat16_t"]
    unwanted = [r"FlashAttnFwdSm80"]
    for keep, name in ((keep_fp8, "12float_e4m3_t"), (keep_fp16, "6half_t")):
        if keep:
            elements.append(name)
        else:
            unwanted.append(rf"FlashAttnFwdSm90\w*?ENS_{name}")
    wanted = "|".join(map(str, sorted(heads)))
    unwanted.append(rf"FlashAttnFwdSm90\w*?ELi(?!(?:{wanted})E)\d+ENS_(?:{'|'.join(elements)})Ef")
    return "|".join(unwanted)
