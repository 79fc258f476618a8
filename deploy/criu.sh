#!/bin/sh
# Fetch a CRIU that can dump what runs on today's kernels, into a folder of its own.
#
#   deploy/criu.sh FOLDER        then: export DOHERTY_CRIU=FOLDER/criu
#
# Debian 12 has CRIU 3.17, which fails on kernel 6.18 (it does not know the new vdso), and Debian 13
# has 4.1, which cannot dump a listening TCP socket from 6.16 on. So the packages of Debian's
# unstable suite are fetched, from the mirror that this machine's apt uses, by an apt with lists, cache
# and status of its own: nothing is installed and nothing of the system changes. They want a younger
# C library than the system has, so CRIU runs by the loader that came with them. Some 8 MB are fetched.
set -eu
[ $# -eq 1 ] || { echo "usage: deploy/criu.sh FOLDER" >&2; exit 2; }
case $(uname -m) in x86_64) arch=amd64; triplet=x86_64-linux-gnu; loader=ld-linux-x86-64.so.2 ;;
    aarch64) arch=arm64; triplet=aarch64-linux-gnu; loader=ld-linux-aarch64.so.1 ;;
    *) echo "no CRIU for $(uname -m) is known here" >&2; exit 1 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
if [ -x "$folder/criu" ] && "$folder/criu" --version >/dev/null 2>&1; then
    echo "$folder/criu"
    exit 0
fi
suite=sid
instead="build CRIU 4.2 or newer from its sources, and name it by DOHERTY_CRIU"
. "$here/debian_suite.sh"
# Packages that bring neither the program nor a library that it is linked with.
packages=$(apt-cache $ours depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances criu | grep -E '^[a-z0-9]' | sort -u |
    grep -vE '^(debconf|cdebconf|perl|python|dpkg|gcc-.*-base|libpython|media-types|netbase|tzdata)')
(cd "$work/debs" && apt-get $ours -q download $packages >&2)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
libraries=$work/root/usr/lib/$triplet
rm -rf "$folder/lib"
mkdir "$folder/lib"
cp "$work/root/usr/sbin/criu" "$folder/criu.bin"
cp -L "$libraries/$loader" "$folder/lib/"
"$libraries/$loader" --library-path "$libraries" --list "$folder/criu.bin" |
    awk '/^[[:space:]]*lib/ {print $1}' | while read -r library; do cp -L "$libraries/$library" "$folder/lib/"; done
cat >"$folder/criu" <<RUN
#!/bin/sh
folder=\$(dirname "\$(readlink -f "\$0")")
exec "\$folder/lib/$loader" --library-path "\$folder/lib" "\$folder/criu.bin" "\$@"
RUN
chmod 755 "$folder/criu"
"$folder/criu" --version >&2
echo "$folder/criu"
