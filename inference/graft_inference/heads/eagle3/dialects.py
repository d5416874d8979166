"""The configuration of an EAGLE-3 head on disk, in two dialects that are both read and written.

The flat dialect is SGLang's and the official EAGLE's: a flat Llama configuration, the layer named `midlayer`. vLLM's
"speculators" dialect nests that configuration and names the layer `layers.0`. The ids of the aux layers have
two conventions: id i = *output* of layer i inside `eagle_config` (SGLang, ours), id i + 1 = *input* of that next
layer at the top level (vLLM). We write both.

SGLang reads none of the keys of newer trainers and skips tensors that it does not know: such a head would draft badly
there, and nothing would say why. So a head that has any of them (`newer_than_sglang`) is written in the nested dialect,
which SGLang refuses, and every other one in the flat dialect. Where the target's name is known, the nested keys stand
beside the flat ones: with them `vllm serve HEAD` finds the target by itself, and every engine reads what it read.
"""

from collections.abc import Iterable
from typing import Any

import torch

from ...errors import GraftError
from ..checkpoint import (
    HARMLESS,
    NESTED,
    OF_SPECULATORS,
    SPECULATORS,
    Verifier,
    check_keys,
    given_or,
    of_speculators,
    rope_and_dtype,
    rope_of,
)
from .model import DraftHeadConfig, default_aux_layer_ids

AUX_IDS = "eagle_aux_hidden_state_layer_ids"
SLIDING = "sliding_attention"

READ = frozenset({
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
    "target_hidden_size", "draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output",
    "eagle_config", SPECULATORS, NESTED, AUX_IDS,
})  # fmt: skip
"""Keys that what is computed is read from."""
COMPUTED = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "additional_fc": False,
    "logit_scale": 1,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
}
"""Keys that change what is computed, each with the value that this module computes; null and absent mean it too."""
EAGLE_CONFIG = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
"""The same within eagle_config, as NVIDIA's heads have it."""
COUNTED = frozenset({"num_aux_hidden_states", "num_aux_layers"})
"""How many aux hidden states vLLM expects: fc.weight must have the shape of as many as are named here."""
OF_PARALLEL_STEPS = frozenset({"parallel_draft_heads_num_layers"})
"""Of layers that NVIDIA's heads have only with a parallel_draft_step of more than 1."""
PARALLEL = ("pard_token", "ptd_token_id", "mask_token_id", "mask_hidden")
"""What only P-EAGLE's heads have, keys or tensors."""
LLAMA_LAYERS = ("Eagle3MiniMaxM2ForCausalLM", "Eagle3Qwen2_5vlForCausalLM", "Eagle3Qwen3vlForCausalLM")
"""Architectures of vLLM that are named after their target and have a Llama layer."""
SPECULATIVE_TOKENS = 3
"""What vLLM drafts where neither its user nor the exporter of a bundle says anything else."""


def newer_than_sglang(config: DraftHeadConfig) -> list[str]:
    """What a head has that SGLang's flat dialect has no word for, and that SGLang would leave out in silence."""
    names = ("qk_norm", "sliding_window", "norm_before_fc", "fc_norm", "norm_output")
    return [name for name in names if getattr(config, name)]


def head_config_to_dict(
    config: DraftHeadConfig, dtype: torch.dtype, verifier: Verifier | None = None
) -> dict[str, Any]:
    """The configuration that other engines load: flat, nested where the head is more than the flat one says, or both.

    Args:
        verifier: the target; None where its name is not known.
    """
    layer = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **rope_and_dtype(config.rope_parameters, dtype),
    }
    own = {
        "target_hidden_size": config.hidden_size,
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        AUX_IDS: [layer_id + 1 for layer_id in config.aux_layer_ids],
    }
    if newer_than_sglang(config):
        return own | {"architectures": ["Eagle3DraftModel"]} | _nested(config, layer, verifier or Verifier())
    eagle_config = {AUX_IDS: list(config.aux_layer_ids), "use_aux_hidden_state": True}
    flat = {"architectures": ["LlamaForCausalLMEagle3"], **layer, **own, "eagle_config": eagle_config}
    return flat if verifier is None else flat | _nested(config, layer, verifier)


def _nested(config: DraftHeadConfig, layer: dict[str, Any], verifier: Verifier) -> dict[str, Any]:
    """What the speculators dialect has beside the keys of both."""
    window = config.sliding_window
    attends = {
        "layer_types": ["full_attention" if window is None else SLIDING],
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }
    return {
        **of_speculators("eagle3", SPECULATIVE_TOKENS, layer | attends, verifier),
        "tie_word_embeddings": False,
        "dtype": layer["dtype"],
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "embed_requires_grad": False,
    }


def head_config_from_dict(values: dict[str, Any], target_layers: int | None = None) -> DraftHeadConfig:
    """Reads what `head_config_to_dict`, the official EAGLE heads, modelopt and speculators store.

    Raises:
        GraftError: a key is missing, contradicts another, or describes a head that this module is not.
    """
    if SPECULATORS not in values or "hidden_size" not in values:
        return _one_dialect(values, target_layers)
    flat = _one_dialect({name: value for name, value in values.items() if name not in OF_SPECULATORS}, target_layers)
    if _one_dialect(values, target_layers) != flat:
        raise GraftError(f"the top level and {NESTED} describe different heads")
    return flat


def _one_dialect(values: dict[str, Any], target_layers: int | None) -> DraftHeadConfig:
    nested = SPECULATORS in values
    if values.get("block_size") is not None or "dflash_config" in values:
        raise GraftError("this head drafts blocks (head.family=block): it is no EAGLE-3 head")
    kinds = [*(values.get("architectures") or []), values.get(SPECULATORS)]
    refuse_parallel([*(name for name in values if values[name] is not None), *map(str, kinds)])
    if nested and values[SPECULATORS] != "eagle3":
        raise GraftError(f"of the speculators heads only eagle3 can be loaded, not {values[SPECULATORS]!r}")
    layer, eagle = values[NESTED] if nested else values, values.get("eagle_config") or {}
    for part in [values, layer] if nested else [values]:
        check_keys(part, READ, COMPUTED, HARMLESS | COUNTED)
    check_keys(eagle, {AUX_IDS, "norm_before_fc"}, EAGLE_CONFIG, OF_PARALLEL_STEPS)
    hidden_size, heads, window = layer["hidden_size"], layer["num_attention_heads"], _window(layer)
    if given_or(values, "target_hidden_size", hidden_size) != hidden_size:
        raise GraftError("only heads that are as wide as their target can be loaded")
    return DraftHeadConfig(
        hidden_size=hidden_size,
        intermediate_size=layer["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=given_or(layer, "num_key_value_heads", heads),
        head_dim=given_or(layer, "head_dim", hidden_size // heads),
        vocab_size=layer["vocab_size"],
        draft_vocab_size=given_or(values, "draft_vocab_size", layer["vocab_size"]),
        aux_layer_ids=_aux_layer_ids(values, target_layers),
        max_position_embeddings=layer["max_position_embeddings"],
        rms_norm_eps=layer["rms_norm_eps"],
        rope_parameters=rope_of(layer, "full_attention" if window is None else SLIDING),
        norm_before_residual=_norm_before_residual(values, nested),
        qk_norm=_is_qwen3(layer, nested),
        sliding_window=window,
        norm_before_fc=_norm_before_fc(values, eagle),
        fc_norm=given_or(values, "fc_norm", False),
        norm_output=given_or(values, "norm_output", False),
    )


def refuse_parallel(names: Iterable[str]) -> None:
    """Raises GraftError for names that only P-EAGLE heads have, of keys, tensors or architectures."""
    if found := [name for name in names if name in PARALLEL or name.lower().startswith("peagle")]:
        raise GraftError(
            f"this is a P-EAGLE head ({', '.join(found)}): it drafts all tokens in one pass, with a learned state in "
            "place of the features that are not there yet, which is not computed here"
        )


def _is_qwen3(layer: dict[str, Any], nested: bool) -> bool:
    """Whether the layer is Qwen3's, which norms queries and keys.

    Raises:
        GraftError: neither that nor Llama's.
    """
    kind = layer.get("model_type")
    if not nested:
        # The architecture of a flat configuration names the layer; its model_type is often the target's.
        names = [str(name) for name in layer.get("architectures") or []]
        if any("Llama" in name or name in LLAMA_LAYERS for name in names):
            kind = "llama"
        elif any(name.removeprefix("Eagle3") == "Qwen3ForCausalLM" for name in names):
            kind = "qwen3"
    if kind not in (None, "llama", "qwen3"):
        raise GraftError(f"model_type={kind!r} makes another layer: only llama and qwen3 can be computed here")
    return kind == "qwen3"


def _window(layer: dict[str, Any]) -> int | None:
    """The sliding window of the layer.

    Raises:
        GraftError: keys of which engines make different windows, or none.
    """
    kinds, window = layer.get("layer_types"), layer.get("sliding_window")
    used = layer.get("use_sliding_window")
    if kinds not in (None, ["full_attention"], [SLIDING]):
        raise GraftError(f"layer_types={kinds} makes another network: one layer of either kind can be computed here")
    if kinds is None and window is not None and used is not False:
        raise GraftError(f"sliding_window={window} is ambiguous without layer_types: write {[SLIDING]}, or take it out")
    if kinds != [SLIDING]:
        return None
    if window is None or used is False:
        raise GraftError(f"layer_types={kinds} contradicts sliding_window={window} and use_sliding_window={used}")
    return window


def _norm_before_residual(values: dict[str, Any], nested: bool) -> bool:
    """Without the key a flat configuration means False (SGLang, vLLM).

    Raises:
        GraftError: a nested one lacks it.
    """
    given = values.get("norm_before_residual")
    if given is None and nested:
        raise GraftError(
            "norm_before_residual is missing, for which speculators takes false and vLLM true: write which one the "
            "head was trained with"
        )
    return False if given is None else given


def _norm_before_fc(values: dict[str, Any], eagle: dict[str, Any]) -> bool:
    """The one value of the top level and of eagle_config, where vLLM looks first; False where neither has one."""
    given = [part["norm_before_fc"] for part in (values, eagle) if part.get("norm_before_fc") is not None]
    if any(value != given[0] for value in given):
        raise GraftError(f"the top level and eagle_config say different things of norm_before_fc: {given}")
    return given[0] if given else False


def _aux_layer_ids(values: dict[str, Any], target_layers: int | None) -> tuple[int, ...]:
    """The layers whose outputs feed the head, from whichever convention the configuration follows."""
    outputs, inputs = (values.get("eagle_config") or {}).get(AUX_IDS), values.get(AUX_IDS)
    given = outputs if outputs is not None else inputs
    if given is None:
        if target_layers is None:
            raise GraftError(f"{AUX_IDS} is missing: which target layers feed the head is unknown")
        return default_aux_layer_ids(target_layers)
    if not isinstance(given, list) or not all(type(layer) is int for layer in given):
        raise GraftError(f"{AUX_IDS}={given} must be a list of layers")
    layers = tuple(layer - (outputs is None) for layer in given)
    if inputs is not None and inputs != [layer + 1 for layer in layers]:
        raise GraftError(f"the top-level {AUX_IDS}={inputs} must be eagle_config's {list(layers)} plus one")
    if min(layers, default=0) < 0:
        raise GraftError(f"the head reads the target's embeddings ({AUX_IDS}), which is not supported")
    return layers
