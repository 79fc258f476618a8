#!/usr/bin/env bash
# The figures of one engine on a bare GPU host, from bundles to results, within a number of seconds:
# speeds, the EAGLE-3 and FP8 paths, and decode against the planner for the cards that there are.
#
#   bash loadtest/gpu/figures.sh ENGINE BUNDLES OUT SECONDS [ENGINE'S ARGUMENTS]
#
# from the repository's root. BUNDLES holds what deploy/airgap/bundle.py made, by name (BUNDLES/vllm,
# BUNDLES/doherty); without it the engine is taken from PATH. OUT gets a text and a JSON file of each
# command. MODEL and DRAFT name the shapes (default qwen3-8b, eagle3-qwen3-8b), STAGE where things
# are unpacked. With ENGINE=vllm and REHEARSE=1 the simulator takes the engine's part. With two cards
# or more, the speeds are measured on the first while the paths are tried on the second.
set -u
if [ $# -lt 4 ]; then
  echo "usage: figures.sh ENGINE BUNDLES OUT SECONDS [engine's arguments]" >&2
  exit 2
fi
engine=$1 bundles=$2 out=$3 limit=$4
shift 4
begun=$(date +%s)
model=${MODEL:-qwen3-8b}
draft=${DRAFT:-eagle3-qwen3-8b}
stage=${STAGE:-${TMPDIR:-/tmp}/doherty-stage}
mkdir -p "$out" "$stage"
case $engine in
  vllm) ours="--gpu-memory-utilization 0.85" ;;
  sglang) ours="--mem-fraction-static 0.8 --attention-backend fa3 --sampling-backend pytorch"
          ours="$ours --grammar-backend none --mm-feature-transport cpu" ;;
  *) echo "figures.sh: no engine '$engine'; there are vllm and sglang" >&2; exit 2 ;;
esac
left() { echo $(( limit - ( $(date +%s) - begun ) )); }
say() { echo "figures.sh: $(( $(date +%s) - begun )) s: $*"; }

folders=()
for name in doherty "$engine"; do [ -d "$bundles/$name" ] && folders+=("$bundles/$name"); done
if [ ${#folders[@]} -gt 0 ]; then
  python3 deploy/airgap/unpack.py "${folders[@]}" --to "$stage" || exit 1
  # shellcheck disable=SC1091
  . "$stage/env.sh"
fi
common=(--args "$ours $*" --start-timeout 240)
drafted=()
if [ -n "${REHEARSE:-}" ]; then
  common=(--rehearse --args "$*")
else
  for name in "$model" "$draft"; do
    [ -d "$stage/models/$name" ] || python3 deploy/airgap/make_model.py "$stage/models" "$name" || exit 1
  done
  common+=(--model-path "$stage/models/$model")
  drafted=(--draft-path "$stage/models/$draft")
fi
say "ready to begin"

speeds() {
  python3 -m loadtest gpu speeds --engine "$engine" "${common[@]}" \
    --out "$out/speeds-$engine.txt" --json "$out/speeds-$engine.json" > "$out/speeds-$engine.log" 2>&1
  say "speeds ended with $?"
}
paths() {
  python3 -m loadtest gpu paths --engines "$engine" --gpus 1 "${common[@]}" "${drafted[@]}" \
    --limit-s "$(( $(left) - 120 ))" --out "$out/paths-$engine.txt" --json "$out/paths-$engine.json" \
    > "$out/paths-$engine.log" 2>&1
  say "paths ended with $?"
}
cards=$(nvidia-smi -L 2>/dev/null | grep -c GPU)
if [ "$cards" -ge 2 ]; then
  CUDA_VISIBLE_DEVICES=0 speeds &
  CUDA_VISIBLE_DEVICES=1 paths &
  wait
else
  speeds
  paths
fi
known=()
for file in "$out/speeds-$engine.json" "$out/paths-$engine.json"; do
  [ -s "$file" ] && known+=(--measured "$file")
done
python3 -m loadtest gpu floors --engines "$engine" "${common[@]}" "${known[@]}" \
  --limit-s "$(( $(left) - 120 ))" --out "$out/floors-$engine.txt" --json "$out/floors-$engine.json"
say "floors ended with $?"
for file in speeds paths; do cat "$out/$file-$engine.txt" || tail -n 40 "$out/$file-$engine.log"; done
say "done"
