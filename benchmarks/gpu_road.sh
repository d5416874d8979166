#!/usr/bin/env bash
# One command, one GPU: answer, distil, calibrate, evaluate. Arguments go to gpu_road.py, for example --tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/inference${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
exec "${PYTHON:-python3}" benchmarks/gpu_road.py "$@"
