"""A block head on disk: `config.json` and `model.safetensors` in the native dialects of DFlash and DSpark.

A head with fill-in slots is written as `DFlashDraftModel`, one with next-token slots as `Qwen3DSparkModel`. What
decides how it is computed is always written where both vLLM and SGLang read it: `is_causal` and `layer_types` at the
top level, and the layout of the slots.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from ...errors import GraftError
from ...files import read_safetensors
from ..checkpoint import (
    HARMLESS,
    REMEDY,
    SPECULATORS,
    WEIGHTS_FILE,
    check_keys,
    given_or,
    read_config,
    rope_and_dtype,
    rope_of,
    save_files,
)
from .config import BlockHeadConfig
from .model import BlockHead

DFLASH, DSPARK = "DFlashDraftModel", "Qwen3DSparkModel"
LAYOUT = "sample_from_anchor"
READ = frozenset({
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
    "num_target_layers", "block_size", "is_causal", LAYOUT, "dflash_config", "target_layer_ids", "mask_token_id",
    "markov_rank", "enable_confidence_head",
})  # fmt: skip
"""Keys that what is computed is read from."""
COMPUTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "is_neox_style": True,
    "markov_head_type": "vanilla",
}
"""Keys that change what is computed, each with the value that this module computes; null and absent mean it too."""
OF_TRAINING = frozenset({"confidence_head_with_markov", "num_anchors"})
COMPUTED_NESTED = {
    "use_swa": False,
    "attention_sink_bias": False,
    "attention_value_scale": 1,
    "input_embedding_scale": 1,
    "output_multiplier": 1,
}
READ_NESTED = frozenset({"target_layer_ids", "mask_token_id", "block_size", "causal", "causal_head", LAYOUT})
"""Both within dflash_config."""
CONFIDENCE = "confidence_head."


def save_block_head(head: BlockHead, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the head into `directory`, each file aside and then renamed; other files there stay.

    Args:
        dtype: of the weights; None: the head's. Engines want the target's.
    """
    dtype = dtype or head.fc.weight.dtype
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in head.state_dict().items()
    }
    save_files(directory, tensors, block_config_to_dict(head.config, dtype))


def load_block_config(directory: Path) -> BlockHeadConfig:
    """The shape of a native DFlash or DSpark head.

    Raises:
        GraftError: a missing or corrupt file, or a head that is computed otherwise.
    """
    return read_config(directory, block_config_from_dict, "a block head")


def load_block_head(directory: Path) -> BlockHead:
    """Reads a native DFlash or DSpark head strictly, in the dtype it was saved in, on the CPU.

    A confidence head is left out, which is said: P(accepted) is calibrated here.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the two files do not describe one head.
    """
    config = load_block_config(directory)
    path = Path(directory) / WEIGHTS_FILE
    tensors = read_safetensors(path, REMEDY)
    try:
        return BlockHead.of_tensors(config, _own_tensors(tensors, config))
    except GraftError as error:
        raise GraftError(f"{path}: {error}; {REMEDY}") from error


def _own_tensors(tensors: dict[str, torch.Tensor], config: BlockHeadConfig) -> dict[str, torch.Tensor]:
    """Without those that a native checkpoint may have and that are not read.

    Raises:
        GraftError: a tensor that would make another network or that no engine loads.
    """
    if hidden := [name for name in tensors if "mask_hidden" in name]:
        raise GraftError(f"{hidden}: a learned state in place of the mask token's embedding is not computed here")
    shared = {"embed_tokens.weight"} | ({"lm_head.weight"} if config.draft_vocab_size == config.vocab_size else set())
    if own := sorted(shared & tensors.keys()):
        raise GraftError(f"{own} are of the head's own, but the target's are used: take them out if they are the same")
    if any(name.startswith(CONFIDENCE) for name in tensors):
        warnings.warn("the head's confidence head is not used: P(accepted) is calibrated from traces", stacklevel=4)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(CONFIDENCE)}


def block_config_to_dict(config: BlockHeadConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The native configuration that vLLM and SGLang load."""
    reads = {"target_layer_ids": list(config.aux_layer_ids), "mask_token_id": config.mask_token_id}
    values = {
        "architectures": [DSPARK if config.sample_from_anchor else DFLASH],
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **rope_and_dtype(config.rope_parameters, dtype),
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        # SGLang reads is_causal only beside a list of layer_types.
        "is_causal": config.causal,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if not config.sample_from_anchor:
        return values | {"dflash_config": reads | {"causal": config.causal, LAYOUT: False}}
    markov = {"markov_rank": config.markov_rank, "markov_head_type": "vanilla", "enable_confidence_head": False}
    return values | reads | markov | {LAYOUT: True}


def block_config_from_dict(values: dict[str, Any]) -> BlockHeadConfig:
    """Reads what `block_config_to_dict`, DFlash and DSpark store.

    Raises:
        GraftError: a key is missing, contradicts another, or describes a head that this module is not.
    """
    if SPECULATORS in values:
        raise GraftError(f"{SPECULATORS}={values[SPECULATORS]!r}: of block heads only native checkpoints are read yet")
    names = values.get("architectures")
    if names not in ([DFLASH], [DSPARK]):
        raise GraftError(
            f"architectures={names} makes another network: only {DFLASH} and {DSPARK} can be computed here"
        )
    check_keys(values, READ, COMPUTED, HARMLESS | OF_TRAINING)
    nested = values.get("dflash_config") or {}
    check_keys(nested, READ_NESTED, COMPUTED_NESTED)
    if given_or(values, "model_type", "qwen3") != "qwen3":
        raise GraftError(f"model_type={values['model_type']!r} makes another layer: only qwen3 can be computed here")
    layers, kinds, window = values["num_hidden_layers"], values.get("layer_types"), values.get("sliding_window")
    if kinds is not None and (len(kinds) != layers or any(kind != "full_attention" for kind in kinds)):
        raise GraftError(f"layer_types={kinds} makes another network: only {layers} of full_attention are computed")
    if window is not None and not kinds and values.get("use_sliding_window") is not False:
        raise GraftError(f"sliding_window={window} makes another network: only full_attention is computed")
    heads = values["num_attention_heads"]
    return BlockHeadConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=given_or(values, "num_key_value_heads", heads),
        head_dim=given_or(values, "head_dim", values["hidden_size"] // heads),
        vocab_size=values["vocab_size"],
        draft_vocab_size=given_or(values, "draft_vocab_size", values["vocab_size"]),
        aux_layer_ids=tuple(_agreed("target_layer_ids", values, nested)),
        num_target_layers=values["num_target_layers"],
        block_size=_agreed("block_size", values, nested),
        mask_token_id=_agreed("mask_token_id", values, nested),
        max_position_embeddings=values["max_position_embeddings"],
        causal=_causal(values, nested),
        sample_from_anchor=_layout(values, nested, names == [DSPARK]),
        markov_rank=given_or(values, "markov_rank", 0),
        rms_norm_eps=values["rms_norm_eps"],
        rope_parameters=rope_of(values),
    )


def _agreed(name: str, *places: dict[str, Any]) -> Any:
    """The one value that a key has in whichever places have it.

    Raises:
        GraftError: two places say different things, or none says anything.
    """
    given = [place[name] for place in places if place.get(name) is not None]
    if not given:
        raise GraftError(f"{name} is missing, at the top level as in dflash_config")
    if any(value != given[0] for value in given):
        raise GraftError(f"the top level and dflash_config say different things of {name}: {given}")
    return given[0]


def _causal(values: dict[str, Any], nested: dict[str, Any]) -> bool:
    """Whether slots see those behind them, by the keys of vLLM and SGLang and by JetSpec's; not where none is there."""
    said = [values.get("is_causal"), nested.get("causal"), nested.get("causal_head")]
    given = [value for value in said if value is not None]
    if any(value != given[0] for value in given):
        raise GraftError(f"is_causal, dflash_config.causal and dflash_config.causal_head say different things: {said}")
    return given[0] if given else False


def _layout(values: dict[str, Any], nested: dict[str, Any], is_dspark: bool) -> bool:
    """Whether slots predict the token behind them.

    Raises:
        GraftError: the key contradicts the architecture, or is missing where engines take different defaults.
    """
    given = [place[LAYOUT] for place in (values, nested) if place.get(LAYOUT) is not None]
    if not given and is_dspark and not values.get("markov_rank"):
        raise GraftError(
            f"{LAYOUT} is missing, and engines differ in what a {DSPARK} without a Markov head then predicts: write "
            f"{LAYOUT}: true, or false for a head whose first slot is unused"
        )
    if any(value is not is_dspark for value in given):
        raise GraftError(f"{LAYOUT}={given[0]} and {DSPARK if is_dspark else DFLASH}: no engine computes such a head")
    return is_dspark
