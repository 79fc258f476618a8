#!/usr/bin/env bash
# One call of the fleet run on a bare GPU host: unpack what is there, start or take over, measure, keep.
#
#   bash loadtest/gpu/fleet.sh start  ENGINE BUNDLES OUT SECONDS              # engines begin to start; returns at once
#   bash loadtest/gpu/fleet.sh run    ENGINE BUNDLES OUT SECONDS [ARGUMENTS]  # cells until SECONDS are over
#   bash loadtest/gpu/fleet.sh surge  ENGINE BUNDLES OUT SECONDS [ARGUMENTS]  # the burst; ends the fleet first
#   bash loadtest/gpu/fleet.sh end    ENGINE BUNDLES OUT SECONDS
#
# from the repository's root. BUNDLES holds by name what was carried this time: vllm or sglang, doherty
# (deploy/airgap/bundle.py), compiled.tar.xz (compiled.sh), rivals (pack_rivals.py), traces, and fleet-ENGINE.gz of an earlier
# call, which is gone on with. What was unpacked stays in STAGE, so each is carried once to a warm host.
# OUT gets fleet-ENGINE.gz and a log. ENGINE simulator needs no bundle.
set -u
if [ $# -lt 5 ]; then
  echo "usage: fleet.sh start|run|surge|end ENGINE BUNDLES OUT SECONDS [arguments]" >&2
  exit 2
fi
what=$1 engine=$2 bundles=$3 out=$4 limit=$5
shift 5
begun=$(date +%s)
model=${MODEL:-qwen3-8b}
stage=${STAGE:-${TMPDIR:-/tmp}/doherty-stage}
mkdir -p "$out" "$stage/logs"
export PYTHONUNBUFFERED=1

folders=()
for name in doherty "$engine"; do [ -d "$bundles/$name" ] && folders+=("$bundles/$name"); done
if [ ${#folders[@]} -gt 0 ]; then
  python3 deploy/airgap/unpack.py "${folders[@]}" --to "$stage" || exit 1
fi
# shellcheck disable=SC1091
[ -f "$stage/env.sh" ] && . "$stage/env.sh"
if [ -d "$bundles/rivals" ]; then
  python3 loadtest/gpu/pack_rivals.py --unpack "$bundles/rivals" --to "$stage/rivals" || exit 1
fi
[ -d "$bundles/traces" ] && cp -r "$bundles/traces" "$stage/"
# shellcheck source=loadtest/gpu/compiled.sh
. loadtest/gpu/compiled.sh
path=()
if [ "$engine" != simulator ]; then
  [ -d "$stage/models/$model" ] ||
    python3 deploy/airgap/make_model.py "$stage/models" "$model" || exit 1
  path=(--model-path "$stage/models/$model")
fi
record=$stage/fleet-$engine.gz
[ -f "$record" ] || cp "$bundles/fleet-$engine.gz" "$record" 2> "$out/none.log" || true
rm -f "$out/none.log"
traces=()
for file in "$stage"/traces/*conversation*; do [ -f "$file" ] && traces+=(--conversation-trace "$file"); done
for file in "$stage"/traces/*agent*; do [ -f "$file" ] && traces+=(--agents-trace "$file"); done
rivals=${RIVALS:-$stage/rivals}
kept=(--kept "$stage/fleet-$engine.json" --logs "$stage/logs")
fleet() { python3 -m loadtest gpu fleet --engine "$engine" "${path[@]}" --record "$record" "${kept[@]}" "$@"; }
left() { echo $(( limit - ( $(date +%s) - begun ) - 5 )); }

case $what in
  start) fleet "${traces[@]}" --start "$@" ;;
  end) fleet "${traces[@]}" --end ;;
  run) fleet "${traces[@]}" --rivals "$rivals" --budget-s "$(left)" "$@" ;;
  surge) fleet "${traces[@]}" --end > "$out/end.log" 2>&1
         timeout "$(left)" python3 -m loadtest gpu surge --engine "$engine" "${path[@]}" --record "$record" \
           --logs "$stage/logs/surge" "$@" ;;
  *) echo "fleet.sh: start, run, surge or end, not '$what'" >&2; exit 2 ;;
esac 2>&1 | tee "$out/fleet-$what.log"
status=${PIPESTATUS[0]}
cp "$record" "$out/" 2>> "$out/fleet-$what.log"
echo "fleet.sh: $(( $(date +%s) - begun )) s in all, $what ended with $status"
exit "$status"
