#!/usr/bin/env bash
# One engine proved on a bare GPU host, from bundles to results, within a number of seconds.
#
#   bash loadtest/gpu/host.sh ENGINE BUNDLES OUT SECONDS [ARGUMENTS OF prove] [-- FURTHER ENGINE ARGUMENTS]
#   RUN=ladder bash loadtest/gpu/host.sh vllm BUNDLES OUT 570 --swap 10
#
# from the repository's root. BUNDLES holds what deploy/airgap/bundle.py made, by name (BUNDLES/vllm,
# BUNDLES/doherty). OUT gets ENGINE.txt, ENGINE.json, the logs, and the compile cache to carry along
# the next time. MODEL names the shape (default qwen3-8b), STAGE where things are unpacked; what is
# unpacked already is kept, so that a second run on a warm host starts at once. RUN is another command
# of `loadtest gpu`; the ladder gets weights in files and a small KV cache (what is on the card goes to
# the host's memory), and CRIU where BUNDLES/doherty has one (deploy/airgap/pack_criu.py).
#
# The proxy runs as machine code where BUNDLES has it for these sources: see compiled.sh.
set -u
if [ $# -lt 4 ]; then
  echo "usage: host.sh ENGINE BUNDLES OUT SECONDS [arguments of prove] [-- engine arguments]" >&2
  exit 2
fi
engine=$1 bundles=$2 out=$3 limit=$4
shift 4
begun=$(date +%s)
model=${MODEL:-qwen3-8b}
run=${RUN:-prove}
stage=${STAGE:-${TMPDIR:-/tmp}/doherty-stage}
mkdir -p "$out" "$stage"

case $run in
  prove) load=(--load-format dummy) weights=() context=40960 vllm_kv=(--gpu-memory-utilization 0.45)
         sglang_kv=(--mem-fraction-static 0.45) ;;
  ladder) load=() weights=(--weights 1) context=16384 vllm_kv=(--kv-cache-memory-bytes 3G)
          sglang_kv=(--mem-fraction-static 0.45 --max-total-tokens 24000) ;;
  offline) load=(--load-format dummy) weights=() context=16384 vllm_kv=(--kv-cache-memory-bytes 60G
           --max-num-batched-tokens 16384)  # LLM's own default, for the server as well
           sglang_kv=() ;;
  *) echo "host.sh: RUN is prove, ladder or offline, not '$run'" >&2; exit 2 ;;
esac
own=() engine_args=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do own+=("$1"); shift; done
[ $# -gt 0 ] && shift
case $engine in
  vllm)
    engine_args=("${load[@]}" --max-model-len "$context" "${vllm_kv[@]}" --seed 0) ;;
  sglang)
    engine_args=("${load[@]}" --context-length "$context" "${sglang_kv[@]}" --random-seed 0
      --attention-backend fa3 --sampling-backend pytorch --grammar-backend none
      --mm-feature-transport cpu) ;;
  simulator) ;;
  *) echo "host.sh: no engine '$engine'; there are vllm, sglang and simulator" >&2; exit 2 ;;
esac
engine_args+=("$@")

step() {  # runs a command, and says how long it took
  local at; at=$(date +%s)
  "$@" || { echo "host.sh: failed: $*" >&2; exit 1; }
  echo "host.sh: $(( $(date +%s) - at )) s: $*"
}

folders=()
for name in doherty "$engine"; do [ -d "$bundles/$name" ] && folders+=("$bundles/$name"); done
if [ ${#folders[@]} -gt 0 ]; then
  step python3 deploy/airgap/unpack.py "${folders[@]}" --to "$stage"
  # shellcheck disable=SC1091
  . "$stage/env.sh"
fi

path=()
if [ "$engine" != simulator ]; then
  [ -d "$stage/models/$model" ] ||
    step python3 deploy/airgap/make_model.py "$stage/models" "$model" "${weights[@]}"
  path=(--model-path "$stage/models/$model")
fi

# shellcheck source=loadtest/gpu/compiled.sh
. loadtest/gpu/compiled.sh

left=$(( limit - ( $(date +%s) - begun ) - 5 ))
name=$engine
[ "$run" = prove ] || name=$run-$engine
python3 -m loadtest gpu "$run" --engine "$engine" "${path[@]}" --limit-s "$left" \
  --out "$out/$name.txt" --json "$out/$name.json" --logs "$out/$name-logs" \
  "${own[@]}" -- "${engine_args[@]}" 2>&1 | tee "$out/$name.log"
status=${PIPESTATUS[0]}

if [ -d "$stage/cache/$engine" ]; then
  python3 deploy/airgap/pack_cache.py "$stage" "$engine" "$out" || true
fi
echo "host.sh: $(( $(date +%s) - begun )) s in all, $run ended with $status"
exit "$status"
