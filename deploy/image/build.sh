#!/usr/bin/env bash
# Builds the CPU image from this checkout, without a daemon, and says what is in it.
#
#   deploy/image/build.sh [FOLDER]            FOLDER is dist/image where none is named
#   deploy/image/build.sh --twice [FOLDER]    and again from nothing: fails where the second one differs
#
# Needs root, Debian's podman and runc, and Python 3.11 with pip, which finds torch's CPU build where its configuration
# says. Of the environment it reads
#   BASE               an image to build on (python:3.11-slim-bookworm); where it is not set, Debian 12 with its own
#                      Python, which mmdebstrap makes in FOLDER/base.tar from the mirror that MIRROR names, if any
#   IMAGE              the name (steering-operators), tagged with the version and as latest
#   PYTHON             Python 3.11 (python3)
#   SOURCE_DATE_EPOCH  the time of every file (1980, the earliest that a wheel can have): where it is always the same, a
#                      layer changes only with what is in it
# FOLDER then holds image.oci.tar, sbom.cdx.json, debian.txt and report.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."

twice=
if [ "${1-}" = --twice ]; then twice=1; shift; fi
folder=$(mkdir -p "${1-dist/image}" && cd "${1-dist/image}" && pwd)
image=${IMAGE-steering-operators}
python=${PYTHON-python3}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH-315532800}
export CONTAINERS_CONF=${CONTAINERS_CONF-$PWD/deploy/image/containers.conf}

say() { echo "build.sh: $*" >&2; }

# Debian 12, apt and Python; no documentation, no other languages, no bytecode. $1: the file.
make_base() {
    mmdebstrap --quiet --variant=apt --include=python3,python3-venv,ca-certificates,usr-is-merged \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='find "$1/usr" -type d -name __pycache__ -prune -exec rm -r {} +' \
        bookworm "$1" ${MIRROR:+"$MIRROR"}
}

# The image $2 on the base $1; further arguments go to podman. Nothing is fetched: the wheels are in FOLDER/wheels.
make_image() {
    local base=$1 name=$2
    shift 2
    podman build --quiet --format docker --network none --timestamp "$SOURCE_DATE_EPOCH" --tag "$name" \
        --volume "$folder/wheels:/wheels:ro" --build-arg "BASE=$base" --build-arg PIP_FIND_LINKS=/wheels \
        --build-arg PIP_NO_INDEX=1 --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" \
        --label "org.opencontainers.image.version=$version" \
        --label "org.opencontainers.image.revision=$(git describe --always --dirty --exclude '*')" "$@" .
}

# An image of nothing but the files of $1, by the name $2.
import_base() {
    printf 'FROM scratch\nADD %s /\nCMD ["bash"]\n' "$(basename "$1")" \
        | podman build --quiet --timestamp "$SOURCE_DATE_EPOCH" --tag "$2" --file - "$(dirname "$1")"
}

layers() { podman image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1"; }

base=${BASE-}
if [ -z "$base" ]; then
    base=localhost/$image-base
    # Kept: remove it to take what the mirror has by now.
    if [ ! -e "$folder/base.tar" ]; then
        say "making $folder/base.tar (two minutes) ..."
        make_base "$folder/base.tar"
    fi
    import_base "$folder/base.tar" "$base" >/dev/null
fi

say "getting the wheels of the lock files ..."
for lock in build server; do
    "$python" -m pip download -qq --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
        --dest "$folder/wheels" -r deploy/image/$lock.lock
done

say "building $image:$version ..."
make_image "$base" "localhost/$image:$version" >/dev/null
podman tag "localhost/$image:$version" "localhost/$image:latest"
rm -f "$folder/image.oci.tar"
podman save --quiet --format oci-archive --output "$folder/image.oci.tar" "localhost/$image:$version"

root=$(podman image mount "localhost/$image:$version")
"$python" deploy/image/sbom.py "$root" "$image:$version" deploy/image/server.lock >"$folder/sbom.cdx.json"
chroot "$root" dpkg-query --show >"$folder/debian.txt"
biggest=$(cd "$root" && du -sm usr opt/steer/lib/python3.11/site-packages/* | sort -rn | sed -n 1,8p)
podman image unmount "localhost/$image:$version" >/dev/null

{
    echo "image       localhost/$image:$version"
    echo "digest      $(podman image inspect --format '{{.Digest}}' "localhost/$image:$version")"
    echo "unpacked    $(($(podman image inspect --format '{{.Size}}' "localhost/$image:$version") >> 20)) MiB"
    echo "archive     $(($(stat -c %s "$folder/image.oci.tar") >> 20)) MiB, sha256 $(sha256sum "$folder/image.oci.tar" | cut -d' ' -f1)"
    echo "packages    $(grep -c '"purl": "pkg:pypi/' "$folder/sbom.cdx.json") of Python, $(wc -l <"$folder/debian.txt") of Debian"
    echo "layers"
    layers "localhost/$image:$version" | sed '/^$/d; s/^/  /'
    podman history --format '  {{.Size}}  {{.CreatedBy}}' "localhost/$image:$version" | grep -v '^  0 B' | cut -c1-100
    echo "largest, in MiB"
    echo "$biggest" | sed 's/^/  /'
} >"$folder/report.txt"
cat "$folder/report.txt"

if [ -n "$twice" ]; then
    say "building it again from nothing ..."
    again=localhost/$image-again
    if [ -z "${BASE-}" ]; then
        make_base "$folder/again.tar"
        cmp "$folder/base.tar" "$folder/again.tar" || { say "the second base is another one"; exit 1; }
        rm "$folder/again.tar"
        say "the second base is the same, byte for byte"
    fi
    make_image "$base" "$again" --no-cache >/dev/null
    if [ "$(podman image inspect --format '{{.Id}}' "localhost/$image:$version" "$again" | uniq | wc -l)" != 1 ]; then
        diff <(layers "localhost/$image:$version") <(layers "$again") >&2 || true
        say "the second image is another one; $again stays for comparing"
        exit 1
    fi
    podman untag "$again"
    say "the second image is the same, digest for digest"
fi
