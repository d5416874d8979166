#!/usr/bin/env bash
# The EAGLE-3 module that modelopt 0.47.0 trains norms the features twice. A comment in it says that the decoder layer's
# own input norm is disabled; it is not: the same `input_layernorm` that norms the embeddings norms the features, too, and
# `hidden_norm` comes after it. SGLang and vLLM compute `hidden_norm(features)` alone, and the exported config says nothing of
# the other norm. Seen with nvidia-modelopt 0.47.0, transformers 5.19.0 and torch 2.13.0. Why it matters: once training has
# moved the weights of `input_layernorm` away from 1, engines serve another network than the one that was trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.19.0
"$work/venv/bin/pip" install --quiet --no-deps nvidia-modelopt==0.47.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import importlib.util
from importlib.metadata import distribution, version

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# The module alone: the package around it asks for more than this needs.
path = distribution("nvidia-modelopt").locate_file("modelopt/torch/speculative/plugins/modeling_eagle.py")
spec = importlib.util.spec_from_file_location("modeling_eagle", path)
modeling_eagle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(modeling_eagle)

config = LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, draft_vocab_size=10, use_last_layernorm=True, use_aux_hidden_state=True,
    eagle_aux_hidden_state_layer_ids=[0, 1, 2], has_lm_head=False, eagle_decoder_type="llama",
)
config._attn_implementation = "eager"
torch.manual_seed(0)
head = modeling_eagle.EagleModule(config, LlamaDecoderLayer).eval()
head.rotary_emb = modeling_eagle.LlamaRotaryEmbedding(config=config)
layer = head.layers[0]
for norm in (layer.input_layernorm, layer.hidden_norm):
    norm.weight.data = torch.rand(16) + 0.5

seen = []
layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
features, embeddings = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
with torch.no_grad():
    head(features, embeddings, torch.zeros(1, 1, 5, 5))
    attended, (normed_embeddings, second_half) = seen[0], seen[0].split(16, dim=-1)
    once = layer.hidden_norm(features)
    twice = layer.hidden_norm(layer.input_layernorm(features))

print("nvidia-modelopt", version("nvidia-modelopt"), "transformers", version("transformers"), "torch", torch.__version__)
print("attention reads", list(attended.shape), "- embeddings and features")
print("hidden_norm(features):", torch.allclose(second_half, once, atol=1e-5), f"{(second_half - once).abs().max():.3f} off")
print("hidden_norm(input_layernorm(features)):", torch.allclose(second_half, twice, atol=1e-5))
assert torch.allclose(normed_embeddings, layer.input_layernorm(embeddings), atol=1e-5)
assert torch.allclose(second_half, twice, atol=1e-5)
assert not torch.allclose(second_half, once, atol=0.1)
PY
