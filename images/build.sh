#!/bin/sh
# build.sh: makes the images of the demo and the tests, and prints the directory they are in.
#
# The directory holds `registry`, the storage of a Debian docker-registry with all images pushed.
# It is made once for each content of this folder and kept under $XDG_CACHE_HOME or ~/.cache.
# Needs root and the Debian packages which tests/xtask/src/assets.rs names; a Debian mirror is asked for packages.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

key=$(cat "$here"/*.sh | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead/images
[ ! -d "$cache/$key/registry" ] || { echo "$cache/$key"; exit 0; }

mkdir -p "$cache"
work=$(mktemp -d "$cache/work.XXXXXX")
registry=
finish() {
    [ -z "$registry" ] || kill "$registry" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM
layout=$work/layout
mkdir "$work/out" "$layout"
umoci init --layout "$layout/test"

# The recipes, in the order they build on each other.
. "$here/base.sh"
. "$here/hostile.sh"
. "$here/multi.sh"
. "$here/web.sh"

# A free port: the kernel's choice would need a program of its own, so try a few.
for port in 5081 5183 5287 5391 5497; do
    cat > "$work/registry.yml" <<YML
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: "$work/out/registry"}}
http: {addr: "127.0.0.1:$port"}
YML
    docker-registry serve "$work/registry.yml" >"$work/registry.log" 2>&1 &
    registry=$!
    tries=0
    while [ $tries -lt 100 ] && kill -0 $registry 2>/dev/null; do
        if busybox wget -q -O /dev/null 2>/dev/null "http://127.0.0.1:$port/v2/" && kill -0 $registry; then
            break 2
        fi
        tries=$((tries + 1))
        sleep 0.1
    done
    kill $registry 2>/dev/null || true
    registry=
done
[ -n "$registry" ] || { echo "docker-registry does not start:" >&2; tail "$work/registry.log" >&2; exit 1; }

# push IMAGE-IN-LAYOUT NAME:TAG [SKOPEO-OPTION...]
push() {
    from=$1 to=$2
    shift 2
    skopeo copy --quiet --insecure-policy --dest-tls-verify=false "$@" \
        "oci:$layout/test:$from" "docker://127.0.0.1:$port/$to" >&2
}
push base test/base:1
push base test/base:same
push config test/config:1
push pause test/pause:1
push hardlink test/hardlink:1
for name in $hostiles; do
    push "$name" "test/$name:1"
done
push base test/docker:1 --format v2s2
push multi test/multi:1 --all
push web demo/web:1
# Layers that are compressed already stay as they are, so to zstd by way of none; and a registry
# that has a layer under another digest is not asked for it.
copy='skopeo copy --quiet --insecure-policy'
$copy --dest-decompress "oci:$layout/test:base" "dir:$work/plain" >&2
$copy --dest-compress --dest-compress-format zstd "dir:$work/plain" "dir:$work/zstd" >&2
$copy --preserve-digests --dest-tls-verify=false "dir:$work/zstd" "docker://127.0.0.1:$port/test/zstd:1" >&2

kill $registry
wait $registry 2>/dev/null || true
registry=
# Somebody else may have been faster; theirs is the same.
mv -T "$work/out" "$cache/$key" 2>/dev/null || [ -d "$cache/$key/registry" ]
echo "$cache/$key"
