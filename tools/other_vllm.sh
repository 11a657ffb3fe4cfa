#!/bin/sh
# Makes a vLLM of another version that runs on a CPU, before there is a CPU build of it: that version's Python over the
# kernels of the CPU build in .venv. Good for the tests of the engine vllm, which then say what moved; not for serving.
#
#     tools/other_vllm.sh 0.33.0 /tmp/vllm-0.33
#     PYTHONPATH=/tmp/vllm-0.33 .venv/bin/python -m pytest tests/contract tests/server/engine/vllm
set -eu
[ $# -eq 2 ] || { echo "usage: $0 VERSION FOLDER" >&2; exit 2; }
version=$1 folder=$2 python=${PYTHON:-.venv/bin/python}
[ ! -e "$folder" ] || { echo "$folder exists" >&2; exit 2; }
kernels=$("$python" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("vllm").origin))')
mkdir -p "$folder"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip download -q --no-deps --only-binary :all: --dest "$wheels" "vllm==$version"
"$python" -m zipfile -e "$wheels"/vllm-*.whl "$folder"
find "$folder/vllm" -name '*.so' -delete
cp "$kernels"/*.so "$folder/vllm/"
# vLLM takes the platform from its own version's name.
sed -i "s/^Version: .*/Version: $version+cpu/" "$folder"/vllm-*.dist-info/METADATA
