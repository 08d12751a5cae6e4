#!/usr/bin/env bash
# All that needs a GPU, tests and figures, in under ten minutes: benchmarks/results/gpu.json.
#
#   benchmarks/gpu.sh                 with what is installed
#   WHEELS=folder benchmarks/gpu.sh   on a machine with torch and no network: the rest comes from wheels in the folder
#
# PYTHON is the interpreter that has torch (python3 by default). Without a GPU it says so and changes nothing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/gpu.sh: $python finds no CUDA device, so nothing was run and nothing was written"
    exit 0
fi

if [[ -n "${WHEELS:-}" ]]; then
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    "$python" -m venv --system-site-packages "$folder"
    "$folder/bin/python" -m pip install --quiet --no-index --find-links "$WHEELS" \
        diffusers nvidia-ml-py networkx typer rich jinja2 numpy pytest hypothesis
    python="$folder/bin/python"
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m benchmarks.gpu
