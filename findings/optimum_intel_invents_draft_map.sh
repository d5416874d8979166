#!/usr/bin/env bash
# An EAGLE-3 head that drafts over the whole vocabulary needs no map `d2t`, and is commonly saved without one. The exporter
# to OpenVINO gives its module such a map of zeros, but loads the head on the meta device, so what the file lacks is
# memory that nobody wrote. That becomes a constant of the exported graph: draft ids are shifted by arbitrary numbers.
# The same head with a map of zeros is exported as it is. Neither export fails.
# Seen with optimum-intel 2.2.0, openvino 2026.4.1, transformers 5.5.4 and torch 2.14.1. Why it matters: the exported
# model looks whole, and its drafts are refused, or are no tokens at all, wherever it is served.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.5.4 numpy==2.4.6 \
    optimum==2.3.0 optimum-intel==2.2.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 nncf==3.4.0 \
    diffusers==0.39.0 einops==0.8.2
cd "$work"
export HOME="$work" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PY'
import json
import os

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

torch.manual_seed(0)
vocabulary, hidden = 64, 32
shapes = {
    "fc": (hidden, 3 * hidden), "lm_head": (vocabulary, hidden), "norm": (hidden,),
    "midlayer.input_layernorm": (hidden,), "midlayer.hidden_norm": (hidden,), "midlayer.post_attention_layernorm": (hidden,),
    "midlayer.self_attn.q_proj": (hidden, 2 * hidden), "midlayer.self_attn.k_proj": (hidden, 2 * hidden),
    "midlayer.self_attn.v_proj": (hidden, 2 * hidden), "midlayer.self_attn.o_proj": (hidden, hidden),
    "midlayer.mlp.gate_proj": (48, hidden), "midlayer.mlp.up_proj": (48, hidden), "midlayer.mlp.down_proj": (hidden, 48),
}
weights = {name + ".weight": torch.randn(shape) for name, shape in shapes.items()}
maps = {"d2t": torch.zeros(vocabulary, dtype=torch.int64), "t2d": torch.ones(vocabulary, dtype=torch.bool)}
config = LlamaConfig(
    vocab_size=vocabulary, hidden_size=hidden, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, tie_word_embeddings=False, dtype="float32",
    architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=vocabulary,
)
for name, tensors in (("with_map", weights | maps), ("without_map", weights)):
    os.mkdir(name)
    save_file(tensors, name + "/model.safetensors", {"format": "pt"})
    with open(name + "/config.json", "w") as file:
        json.dump(config.to_dict(), file)
PY
for head in with_map without_map; do
    "$work/venv/bin/optimum-cli" export openvino --model "$head" --task text-generation-with-past --trust-remote-code \
        "exported_$head" > log.txt 2>&1 || { cat log.txt; exit 1; }
done
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import openvino

print("optimum-intel", version("optimum-intel"), "openvino", version("openvino"), "transformers", version("transformers"))


def exported_map(folder):
    nodes = openvino.Core().read_model(folder + "/openvino_model.xml").get_ops()
    (node,) = [node for node in nodes if node.get_friendly_name().endswith("d2t")]
    return node.data


with_map, without_map = exported_map("exported_with_map"), exported_map("exported_without_map")
print("from a head with a map of zeros:", with_map[:8])
print("from the same head without it:  ", without_map[:8])
assert not with_map.any()
assert without_map.any()
PY
