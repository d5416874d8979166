#!/usr/bin/env bash
# A cache of a model with full and sliding layers refuses to be cropped once a window is full, unless it was told to
# record. It refuses in the middle: the layers before the first sliding one are already shorter. The length it reports
# is that of the cropped ones, and the next forward runs without an error and gives logits that fit neither length.
# Seen with transformers 5.19.0 and torch 2.13.0, with a small Gemma 3. Why it matters: speculative decoding crops after
# each rejected draft; whoever catches the error and goes on, or crops again, emits tokens of another model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.19.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

torch.manual_seed(0)
config = Gemma3TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["full_attention", "sliding_attention"],
)
model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
tokens, following = torch.randint(0, 64, (1, 12)), torch.randint(0, 64, (1, 1))


def next_logits(cache):
    return model(following, past_key_values=cache).logits[0, -1]


def without_cache(kept):
    return model(torch.cat([tokens[:, :kept], following], dim=1), use_cache=False).logits[0, -1]


def difference(a, b):
    return (a - b).abs().max().item()


cache = DynamicCache(config=config)
model(tokens, past_key_values=cache)
try:
    cache.crop(-2)
    raise SystemExit("crop no longer refuses")
except RuntimeError as error:
    print("transformers", transformers.__version__, "refuses:", error)
lengths = [layer.get_seq_length() for layer in cache.layers]
logits = next_logits(cache)
off = [difference(logits, without_cache(kept)) for kept in (10, 12)]
print("lengths of the layers", lengths, "- the cache says", lengths[0], "- off by", off)

recorded = DynamicCache(config=config)
recorded.activate_past_recording()
model(tokens, past_key_values=recorded)
recorded.crop(-2)
right = difference(next_logits(recorded), without_cache(10))
print("told to record before, off by", right)

assert lengths == [10, 12]
assert min(off) > 1e-3
assert right < 1e-5
PY
