#!/bin/sh
# Fetch Docker's Compose plug-in, into a folder of its own.
#
#   deploy/compose_plugin.sh FOLDER        then: export DOHERTY_COMPOSE=FOLDER/docker-compose
#
# Debian 12 has the engine and no Compose v2. Debian 13's package `docker-compose` holds it as one static
# program, so it is fetched from the mirror that this machine's apt uses, by an apt with lists, cache and
# status of its own: nothing is installed and nothing of the system changes. Some 20 MB are fetched.
set -eu
[ $# -eq 1 ] || { echo "usage: deploy/compose_plugin.sh FOLDER" >&2; exit 2; }
case $(uname -m) in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;;
    *) echo "no Compose for $(uname -m) is known here" >&2; exit 1 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
if [ -x "$folder/docker-compose" ] && "$folder/docker-compose" version >/dev/null 2>&1; then
    echo "$folder/docker-compose"
    exit 0
fi
suite=trixie
instead="install Docker's own package docker-compose-plugin"
. "$here/debian_suite.sh"
(cd "$work/debs" && apt-get $ours -q download docker-compose >&2)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
mv "$work/root/usr/libexec/docker/cli-plugins/docker-compose" "$folder/docker-compose"
"$folder/docker-compose" version >&2
echo "$folder/docker-compose"
