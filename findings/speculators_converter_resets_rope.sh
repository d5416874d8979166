#!/usr/bin/env bash
# The EAGLE-3 converter of speculators 0.9.0 looks for `rope_theta` and `rope_scaling` where transformers 4 wrote them.
# A head whose config.json transformers 5 wrote keeps both in `rope_parameters`: it comes out with the default RoPE of
# theta 10000. `norm_before_residual` and the ids of the tapped layers are read from arguments only, not from the head.
# It ends without an error. Seen with speculators 0.9.0, transformers 5.19.0 and torch 2.13.0. Why it matters: the
# converted head is another network; decoding stays lossless, so only a poor acceptance shows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.19.0 accelerate==1.15.0 \
    datasets==5.1.0 aiohttp openai==3.57.0 loguru==0.7.3 pydantic-settings==2.16.3
"$work/venv/bin/pip" install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import save_file
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

logger.remove()
disable_progress_bar()
hidden, target_vocab, draft_vocab = 32, 64, 32
rope = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
sizes = dict(
    vocab_size=target_vocab, hidden_size=hidden, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, rope_parameters=rope,
)
LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **sizes)).save_pretrained("target")
head = LlamaConfig(
    num_hidden_layers=1, draft_vocab_size=draft_vocab, norm_before_residual=True,
    eagle_aux_hidden_state_layer_ids=[1, 3, 5], architectures=["LlamaForCausalLMEagle3"], **sizes,
)
head.save_pretrained("head")
linears = {
    "fc": (hidden, 3 * hidden), "lm_head": (draft_vocab, hidden), "midlayer.self_attn.q_proj": (32, 2 * hidden),
    "midlayer.self_attn.k_proj": (16, 2 * hidden), "midlayer.self_attn.v_proj": (16, 2 * hidden),
    "midlayer.self_attn.o_proj": (hidden, 32), "midlayer.mlp.gate_proj": (48, hidden),
    "midlayer.mlp.up_proj": (48, hidden), "midlayer.mlp.down_proj": (hidden, 48),
}
norms = ["norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm"]
tensors = {f"{name}.weight": torch.randn(shape) for name, shape in linears.items()}
tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
tensors |= {"d2t": torch.arange(draft_vocab), "t2d": torch.arange(target_vocab) % 2 == 0}
save_file(tensors, "head/model.safetensors")

Eagle3Converter().convert("head", "converted", base_model="target", validate=False)
before = json.loads(Path("head/config.json").read_text())
after = json.loads(Path("converted/config.json").read_text())
layer = after["transformer_layer_config"]
print("speculators", version("speculators"), "transformers", version("transformers"))
for name in ("norm_before_residual", "eagle_aux_hidden_state_layer_ids"):
    print(name, before[name], "->", after[name])
print("rope_parameters", before["rope_parameters"], "->", layer["rope_parameters"])

assert before["rope_parameters"] == rope
assert layer["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
assert (before["norm_before_residual"], after["norm_before_residual"]) == (True, False)
assert (before["eagle_aux_hidden_state_layer_ids"], after["eagle_aux_hidden_state_layer_ids"]) == ([1, 3, 5], None)
PY
