#!/usr/bin/env bash
# generate(guidance_scale=...) takes an assistant model or prompt lookup beside it without complaint, and then its greedy
# output is no longer that of plain greedy decoding with the same guidance. The unconditional branch keeps a cache that grows
# by one token a call; while drafts are verified it is called once for each of them, and after a rejection it goes on
# behind tokens that never became text. Without guidance all three agree.
# Seen with transformers 5.24.0 and torch 2.13.0; 5.19.0 does the same. Why it matters: assisted decoding is sold as a way
# to get the same tokens faster, and a text that is guided by another prompt than the one given looks like any other text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, bos_token_id=0, eos_token_id=None, pad_token_id=0,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
assistant = LlamaForCausalLM(config).eval().requires_grad_(False)
for weight, copied in zip(model.parameters(), assistant.parameters()):
    if weight.dim() > 1:
        weight.mul_(5)
    copied.copy_(weight + 0.02 * torch.randn(weight.shape))
prompt = torch.randint(0, 64, (1, 12))
ways = {"plain": {}, "assisted": {"assistant_model": assistant}, "lookup": {"prompt_lookup_num_tokens": 3}}


def tokens(**settings):
    return {way: model.generate(prompt, max_new_tokens=40, **more, **settings)[0, 12:] for way, more in ways.items()}


def by_hand(scale):
    """Greedy decoding with guidance, without any cache: the other branch sees the text from the prompt's last token."""
    text = prompt
    for _ in range(40):
        given, free = (model(ids, use_cache=False).logits[:, -1].log_softmax(-1) for ids in (text, text[:, 11:]))
        text = torch.cat([text, (free + scale * (given - free)).argmax(-1, keepdim=True)], dim=1)
    return text[0, 12:]


def first_difference(ids, right):
    places = (ids != right).nonzero()
    return int(places[0]) if len(places) else None


print("transformers", transformers.__version__)
unguided, guided, right = tokens(), tokens(guidance_scale=1.5), by_hand(1.5)
alike = {way: first_difference(ids, unguided["plain"]) for way, ids in unguided.items()}
apart = {way: first_difference(ids, right) for way, ids in guided.items()}
print("without guidance, first token other than plain decoding's:", alike)
print("with guidance, first token other than by hand:", apart)
assert set(alike.values()) == {None}
assert apart["plain"] is None
assert apart["assisted"] is not None and apart["lookup"] is not None
PY
