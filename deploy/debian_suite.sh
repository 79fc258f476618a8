# Of another Debian suite than the system's: sourced by scripts that fetch a program from it.
#
# Wants: folder, where the program goes; arch, as Debian calls it; suite; instead, what to do without.
# Leaves: work, a folder that goes with the script; ours, with which apt-get and apt-cache know that suite
# alone, by lists, cache and status of their own, from the mirror that this machine's apt uses. So nothing
# is installed and nothing of the system changes.
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    { echo "apt-get is missing: $instead" >&2; exit 1; }
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/root"
: >"$work/status"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    grep -v '^ *#' | grep -oE '[a-z+]+://[^ ]+/debian/?( |$)' | head -1 | tr -d ' ')
key=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -1)
[ -n "$mirror" ] && [ -n "$key" ] ||
    { echo "apt names no Debian mirror here: $instead" >&2; exit 1; }
echo "deb [signed-by=$key] $mirror $suite main" >"$work/sources.list"
ours="-oAPT::Architecture=$arch -oDir::Etc::sourcelist=$work/sources.list -oDir::Etc::sourceparts=/dev/null
    -oDir::State::Lists=$work/lists -oDir::Cache=$work/cache -oDir::State::status=$work/status
    -oAPT::Sandbox::User=root -oAcquire::Retries=2"
apt-get $ours -q update >&2
