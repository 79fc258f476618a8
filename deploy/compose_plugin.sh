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
instead="install Docker's own package docker-compose-plugin"
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    { echo "apt-get is missing: $instead" >&2; exit 1; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
if [ -x "$folder/docker-compose" ] && "$folder/docker-compose" version >/dev/null 2>&1; then
    echo "$folder/docker-compose"
    exit 0
fi
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/root"
: >"$work/status"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    grep -v '^ *#' | grep -oE '[a-z+]+://[^ ]+/debian/?( |$)' | head -1 | tr -d ' ')
key=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -1)
[ -n "$mirror" ] && [ -n "$key" ] ||
    { echo "apt names no Debian mirror here: $instead" >&2; exit 1; }
echo "deb [signed-by=$key] $mirror trixie main" >"$work/sources.list"
ours="-oAPT::Architecture=$arch -oDir::Etc::sourcelist=$work/sources.list -oDir::Etc::sourceparts=/dev/null
    -oDir::State::Lists=$work/lists -oDir::Cache=$work/cache -oDir::State::status=$work/status
    -oAPT::Sandbox::User=root -oAcquire::Retries=2"
apt-get $ours -q update >&2
(cd "$work/debs" && apt-get $ours -q download docker-compose >&2)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
mv "$work/root/usr/libexec/docker/cli-plugins/docker-compose" "$folder/docker-compose"
"$folder/docker-compose" version >&2
echo "$folder/docker-compose"
