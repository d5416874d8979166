"""Tiny random targets of every supported family, their windows shorter than the tests' longer prompts."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .tiny import SIZES

WINDOW = 7
MIXED = ["sliding_attention", "full_attention"] * 2
FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES = {
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "qwen2": lambda sizes: Qwen2ForCausalLM(Qwen2Config(**sizes)),
    "qwen2-mixed": lambda sizes: Qwen2ForCausalLM(
        Qwen2Config(**sizes, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    ),
    "qwen3": lambda sizes: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
    "mistral": lambda sizes: MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)),
    "mistral-window": lambda sizes: MistralForCausalLM(MistralConfig(**sizes, sliding_window=WINDOW)),
    "mixtral": lambda sizes: MixtralForCausalLM(MixtralConfig(**sizes, **FEW_EXPERTS)),
    "qwen3-moe": lambda sizes: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "gemma2": lambda sizes: Gemma2ForCausalLM(
        Gemma2Config(
            **sizes,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=MIXED,
            attn_logit_softcapping=0.7,
            attn_implementation="eager",
        )
    ),
    "gemma3": lambda sizes: Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=MIXED)
    ),
    "phi3": lambda sizes: Phi3ForCausalLM(Phi3Config(**sizes, sliding_window=WINDOW)),
    "olmo": lambda sizes: OlmoForCausalLM(OlmoConfig(**sizes, clip_qkv=3.0)),
    "gpt-oss": lambda sizes: GptOssForCausalLM(
        GptOssConfig(
            **sizes,
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=MIXED,
            **FEW_EXPERTS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
}


def family_model(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = FAMILIES[name](SIZES | overrides)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
        elif parameter.dim() == 1:
            # Sinks and biases start at zero, norms at one or zero: with noise, leaving one out shows.
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval().requires_grad_(False)
