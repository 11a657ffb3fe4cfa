#!/usr/bin/env bash
# Generates the Python stubs beside the .proto files, or checks that they are current.
#   tools/stubs.sh            write them
#   tools/stubs.sh --check    compare, and fail with a diff when they differ
# The generator lives in an environment of its own: its output loads on every protobuf that
# pyproject.toml admits, while newer generators would force the newest protobuf on users.
set -euo pipefail
cd "$(dirname "$0")/.."
env=.venv-stubs
python=${PYTHON:-python3}
if [ ! -x $env/bin/protoc-gen-mypy ]; then
    "$python" -m venv $env
    $env/bin/pip install --quiet grpcio-tools==1.81.1 mypy-protobuf==5.1.0 setuptools
fi
out=protos
if [ "${1:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
PATH="$PWD/$env/bin:$PATH" $env/bin/python -m grpc_tools.protoc -Iprotos \
    --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
    protos/steering/v1/*.proto
if [ "$out" != protos ]; then
    for file in "$out"/steering/v1/*; do
        diff -u "protos/steering/v1/$(basename "$file")" "$file" || {
            echo "stubs are not those of the .proto files: run 'make stubs'" >&2
            exit 1
        }
    done
    echo "stubs are current"
fi
