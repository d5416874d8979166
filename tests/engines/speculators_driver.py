"""Runs EAGLE-3 heads of speculators, by the Python of its own environment: `python ... JOB.json RESULT.json`.

The job:
    inputs  safetensors: tokens [N] and the target's aux hidden states taps [N, E] of a text
    steps   of the draft
    made    {directory: {"layer": model_type, "window": positions or null, and Eagle3SpeculatorConfig's own settings}}:
            heads that are made at random and saved there
    read    directories of heads that are loaded

The result: {directory: safetensors with "logits" [steps, N - 1, Vd]}, where row t of step k is of the draft that starts
at t and has read the text's own tokens to t + 1 + k; rows whose tokens lie beyond the text mean nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, Qwen3Config

WIDTH, VOCAB, DRAFT_VOCAB = 32, 61, 40
KINDS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    inputs, result = load_file(job["inputs"]), {}
    for directory, settings in job["made"].items():
        made(dict(settings)).save_pretrained(directory)
    for directory in [*job["made"], *job["read"]]:
        logits = run(loaded(directory), inputs, job["steps"])
        result[directory] = str(Path(directory) / "logits.safetensors")
        save_file({"logits": logits}, result[directory])
    Path(result_path).write_text(json.dumps(result))


def made(settings: dict[str, Any]) -> Eagle3DraftModel:
    """As its trainer makes a head, but small and of random weights."""
    kind, window = settings.pop("layer"), settings.pop("window")
    types = ["full_attention" if window is None else "sliding_attention"]
    layer = KINDS[kind](**SIZES, layer_types=types, sliding_window=window, use_sliding_window=window is not None)
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=DRAFT_VOCAB,
        eagle_aux_hidden_state_layer_ids=[1, 2, 4],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
        **settings,
    )
    model = Eagle3DraftModel(config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        is_norm = parameter.dim() == 1
        parameter.data = torch.randn(parameter.shape) * (0.4 if is_norm else 0.15) + is_norm
    kept = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True)
    model.load_vocab_mappings(t2d, kept - torch.arange(DRAFT_VOCAB))
    return model


def loaded(directory: str) -> Eagle3DraftModel:
    """Reads a head, and the embeddings that it does not bring of the target that it names.

    Not by `from_pretrained`: that leaves such embeddings as they lie in memory, since only NaN would have the target's
    loaded (0.9.0 with transformers 5.19).
    """
    config = Eagle3SpeculatorConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel(config)
    missing, unknown = model.load_state_dict(load_file(Path(directory) / "model.safetensors"), strict=False)
    assert not unknown, unknown
    assert all(name.startswith(("verifier_", "embed_tokens")) for name in missing), missing
    if config.speculators_config.verifier.name_or_path is not None:
        model.load_verifier_weights()
    return model.eval()


@torch.no_grad()
def run(model: Eagle3DraftModel, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    # Its trainer sets token t + 1 beside the states of t.
    tokens, taps = inputs["tokens"][None, 1:], inputs["taps"][None, :-1]
    model(hidden_states=taps, input_ids=tokens, document_ids=torch.zeros_like(tokens), ttt_steps=steps)
    hook.remove()
    return torch.stack(logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
