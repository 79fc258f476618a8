# Sourced with $bundles, $stage and $out: the proxy runs as machine code where BUNDLES/compiled.tar.xz fits
# the sources here. It is made by
#   DOHERTY_COMPILED=FOLDER python3.12 -m proxy.compile && tar cJf BUNDLES/compiled.tar.xz -C FOLDER .
# with the host's minor release of Python. What was unpacked before is used again.
# shellcheck shell=bash disable=SC2154
if [ -e "$bundles/compiled.tar.xz" ] && [ ! -d "$stage/compiled" ]; then
  mkdir -p "$stage/compiled"
  tar xJf "$bundles/compiled.tar.xz" -C "$stage/compiled"
  made=$(echo "$stage"/compiled/*)
  if diff -rq -x '*.so' -x __pycache__ "$made/proxy" proxy > "$out/compiled.diff"; then
    fits=$stage/compiled/$(python3 -c 'from proxy.compile import digest; print(digest())')
    [ "$made" = "$fits" ] || mv "$made" "$fits"  # the name has the full release of Python in it
  else
    echo "compiled.tar.xz is of other sources, see compiled.diff; the sources run" >&2
  fi
fi
[ -d "$stage/compiled" ] && export DOHERTY_COMPILED=$stage/compiled
