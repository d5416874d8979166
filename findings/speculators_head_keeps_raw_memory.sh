#!/usr/bin/env bash
# speculators 0.9.0 lets a checkpoint of an EAGLE-3 head leave out its embeddings (its class lists them among the keys that
# may be missing), and then means to load those of the target that the config names. Under transformers 5.19.0
# `from_pretrained` does not load them: the class marks missing embeddings by NaN, transformers fills the model's memory
# without running that code, and what happens to lie there is no NaN. There is no warning. Seen with speculators 0.9.0,
# transformers 5.19.0 and torch 2.13.0. Why it matters: a head that shares its target's embeddings, as most published ones
# do, is trained on, measured or converted as a network that reads noise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.19.0 accelerate==1.15.0 \
    datasets==5.1.0 aiohttp openai==3.57.0 loguru==0.7.3 pydantic-settings==2.16.3
"$work/venv/bin/pip" install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
from importlib.metadata import version
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

logger.remove()
disable_progress_bar()
sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes))
target.save_pretrained("target")
config = Eagle3SpeculatorConfig(
    transformer_layer_config=LlamaConfig(num_hidden_layers=1, layer_types=["full_attention"], **sizes),
    draft_vocab_size=40,
    eagle_aux_hidden_state_layer_ids=[1, 2, 4],
    speculators_config=SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=str(Path("target").resolve()), architectures=["LlamaForCausalLM"]),
    ),
)
head = Eagle3DraftModel(config)
torch.manual_seed(1)
for parameter in head.parameters():
    parameter.data = torch.randn(parameter.shape)
head.load_vocab_mappings(torch.arange(61) < 40, torch.zeros(40, dtype=torch.long))
head.embed_tokens.weight.data.fill_(torch.nan)
head.load_verifier_weights()
wanted = target.model.embed_tokens.weight
assert torch.equal(head.embed_tokens.weight, wanted), "as its trainer has it"
head.save_pretrained("head")
tensors = load_file("head/model.safetensors")
del tensors["embed_tokens.weight"]
save_file(tensors, "head/model.safetensors", {"format": "pt"})
print("may be missing:", "embed_tokens.weight" in Eagle3DraftModel._keys_to_ignore_on_load_missing)

print("speculators", version("speculators"), "transformers", version("transformers"), "torch", torch.__version__)
PY
for _ in 1 2 3; do  # in a process of its own, whose memory has not held the embeddings before
    OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from loguru import logger
from safetensors import safe_open
from speculators.models.eagle3 import Eagle3DraftModel
from transformers.utils.logging import disable_progress_bar

logger.remove()
disable_progress_bar()
loaded = Eagle3DraftModel.from_pretrained("head")
own = loaded.embed_tokens.weight.detach().clone()
loaded.embed_tokens.weight.data.fill_(torch.nan)
loaded.load_verifier_weights()
with safe_open("target/model.safetensors", "pt") as target:
    wanted = target.get_tensor("model.embed_tokens.weight")
print("loaded: the target's embeddings", torch.equal(own, wanted), "- NaN among them", bool(own.isnan().any()))
print("after NaN was put there and load_verifier_weights():", torch.equal(loaded.embed_tokens.weight, wanted))
assert not torch.equal(own, wanted)
assert torch.equal(loaded.embed_tokens.weight, wanted)
PY
done
