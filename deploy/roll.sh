#!/bin/sh
# Put another container in the place of the proxy's, of the image and configuration as they are now, losing no request.
#
#   deploy/roll.sh [SERVICE]        SERVICE: proxy, which is the default, or proxy-eu and so on
#
# `docker compose up` would stop the old one first. Here the new one starts beside it, in the same network, and takes over
# its listening sockets (`doherty proxy --takeover`); only then does the old one leave, and it finishes what it has. If the
# new one does not come up, the old one goes on as if nobody had come. DOHERTY_ROLL_WAIT: seconds to wait for the old one's
# end (3700, which is more than upgrade_grace_period_secs); beyond it, it is left to end by itself.
#
# Cut off before the new one has taken over, it takes the new one away again; after that, the old one ends by itself, and the
# next roll removes it. Two at once would each undo what the other does, so the second is refused, where there is flock(1).
set -eu
service=${1:-proxy}
exec 9<"$0"
! command -v flock >/dev/null || flock --nonblock 9 || { echo "another $0 is under way" >&2; exit 1; }
compose() { docker compose --file "$(dirname "$0")/compose.yaml" "$@"; }
state() { docker inspect --format '{{.State.Status}}' "$1" 2>/dev/null || echo gone; }
waited=0
pause() { sleep 0.5; waited=$((waited + 1)); }

old=$(compose ps --quiet --status running "$service")
case $(echo "$old" | wc -w) in
    1) ;;
    0) echo "no container of $service runs: docker compose up --detach $service starts one" >&2; exit 1 ;;
    *) echo "several containers of $service run; a roll is under way, or one was cut off: docker ps" >&2; exit 1 ;;
esac
# What former rolls left ended: Compose would start that again, as it was, in place of a new one.
ended=$(compose ps --quiet --all --status exited --status dead "$service")
[ -z "$ended" ] || docker rm $ended >/dev/null
new=
took_over() { [ -n "$new" ] && docker logs "$new" 2>&1 | grep -q 'took over from the proxy that ran before'; }
find_new() { [ -n "$new" ] || new=$(compose ps --quiet --all "$service" | grep -v "$old") || true; }
undo() {
    trap '' HUP INT TERM
    find_new
    [ -z "$new" ] || docker rm --force "$new" >/dev/null
    docker update --restart=unless-stopped "$old" >/dev/null
    echo "$1; the old one serves on" >&2
    exit 1
}
cut_off() {
    find_new
    ! took_over || { echo "cut off; the new one serves, the old one ends by itself" >&2; exit 1; }
    undo "cut off"
}
trap cut_off HUP INT TERM
# Else Docker would start the old one again when it has left.
docker update --restart=no "$old" >/dev/null
compose up --detach --no-deps --no-recreate --scale "$service=2" "$service" >&2 || undo "the new one was not started"
find_new
[ -n "$new" ] || undo "the new one was not made"
until took_over; do
    pause
    if [ "$(state "$new")" != running ] || [ $waited -gt 240 ]; then
        docker logs --tail 20 "$new" >&2 || true
        undo "the new one did not take over"
    fi
done
echo "the new one serves: $(docker inspect --format '{{slice .Name 1}}' "$new")"
until [ "$(state "$old")" != running ]; do
    pause
    [ $waited -le $((${DOHERTY_ROLL_WAIT:-3700} * 2)) ] ||
        { echo "the old one still finishes answers; remove it when it has ended: docker rm $old"; exit 0; }
done
docker rm "$old" >/dev/null
echo "the old one has finished what it had, and is gone"
