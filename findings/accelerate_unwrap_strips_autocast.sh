#!/usr/bin/env bash
# Accelerator.unwrap_model(model, keep_fp32_wrapper=False) reads as if it gave back a bare model. Without a parallel
# wrapper the prepared model and the unwrapped one are the same object, so autocast is taken off the model that is
# still being trained: each later step runs in float32. Nothing is said.
# Seen with accelerate 1.15.0 and torch 2.13.0, on a CPU in bf16. Why it matters: one checkpoint or one evaluation in
# the middle of a run changes the precision, the memory and the speed of the rest of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" "$work/venv/bin/python" - <<'PY'
import accelerate
import torch

accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
seen = []
model[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
prepared = accelerator.prepare(model)
prepared(torch.randn(2, 8))
accelerator.unwrap_model(prepared)
prepared(torch.randn(2, 8))
accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
prepared(torch.randn(2, 8))
print("accelerate", accelerate.__version__, "computes in", seen)

assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]
PY
