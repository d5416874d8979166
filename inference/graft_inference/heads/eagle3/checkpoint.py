"""The draft head on disk: `config.json` and `model.safetensors`, written in one dialect and read in two.

Ours is SGLang's and the official EAGLE's: a flat Llama configuration, the layer named `midlayer`. vLLM's
"speculators" dialect nests that configuration and names the layer `layers.0`. The ids of the aux layers have
two conventions: id i = *output* of layer i inside `eagle_config` (SGLang, ours), id i + 1 = *input* of that next
layer at the top level (vLLM). We write both.
"""

import re
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
from .model import DraftHead, DraftHeadConfig, default_aux_layer_ids

PICKLED_FILE = "pytorch_model.bin"
AUX_IDS = "eagle_aux_hidden_state_layer_ids"

READ = frozenset({
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
    "target_hidden_size", "draft_vocab_size", "norm_before_residual", "eagle_config", "speculators_model_type",
    "transformer_layer_config", AUX_IDS,
})  # fmt: skip
"""Keys that what is computed is read from."""
COMPUTED = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
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
}
"""The same within eagle_config, as NVIDIA's heads have it."""


def save_head(head: DraftHead, directory: Path) -> None:
    """Writes the head into `directory`, each file aside and then renamed; other files there stay."""
    config = head_config_to_dict(head.config, head.lm_head.weight.dtype)
    save_files(directory, head.state_dict(), config)


def load_head(directory: Path, target_layers: int | None = None) -> DraftHead:
    """Reads a head of either dialect strictly, in the dtype it was saved in, on the CPU.

    Args:
        target_layers: layers of its target, from which follows what a head reads that does not say so.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the two files do not describe one head.
    """
    directory = Path(directory)
    config = load_head_config(directory, target_layers)
    path, tensors = _read_tensors(directory)
    try:
        return DraftHead.of_tensors(config, _our_names(tensors))
    except GraftError as error:
        raise GraftError(f"{path}: {error}; {REMEDY}") from error


def load_head_config(directory: Path, target_layers: int | None = None) -> DraftHeadConfig:
    """The shape of the head in a directory; arguments and errors as `load_head`."""
    return read_config(directory, lambda values: head_config_from_dict(values, target_layers), "a draft head")


def head_config_to_dict(config: DraftHeadConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The flat Llama configuration that SGLang and vLLM load."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "norm_before_residual": config.norm_before_residual,
        **rope_and_dtype(config.rope_parameters, dtype),
        "eagle_config": {AUX_IDS: list(config.aux_layer_ids), "use_aux_hidden_state": True},
        AUX_IDS: [layer + 1 for layer in config.aux_layer_ids],
    }


def head_config_from_dict(values: dict[str, Any], target_layers: int | None = None) -> DraftHeadConfig:
    """Reads what `head_config_to_dict`, the official EAGLE heads and vLLM's speculators store.

    Raises:
        GraftError: a key is missing, contradicts another, or describes a head that this module is not.
    """
    nested = SPECULATORS in values
    if nested and values[SPECULATORS] != "eagle3":
        raise GraftError(f"of the speculators heads only eagle3 can be loaded, not {values[SPECULATORS]!r}")
    if values.get("block_size") is not None or "dflash_config" in values:
        raise GraftError("this head drafts blocks (head.family=block): it is no EAGLE-3 head")
    layer = values["transformer_layer_config"] if nested else values
    for part in [values, layer] if nested else [values]:
        check_keys(part, READ, COMPUTED, HARMLESS)
    check_keys(values.get("eagle_config") or {}, {AUX_IDS}, EAGLE_CONFIG)
    _check_layer(layer, nested)
    hidden_size, heads = layer["hidden_size"], layer["num_attention_heads"]
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
        rope_parameters=rope_of(layer),
        # Without the key a flat configuration means False (SGLang), a nested one True (vLLM).
        norm_before_residual=given_or(values, "norm_before_residual", nested),
    )


def _check_layer(layer: dict[str, Any], nested: bool) -> None:
    """Raises GraftError for another layer than Llama's with full attention."""
    kind = layer.get("model_type")
    # The architecture of a flat configuration names the layer; its model_type is often the target's.
    is_llama = not nested and any("Llama" in str(name) for name in layer.get("architectures") or [])
    if kind not in (None, "llama") and not is_llama:
        raise GraftError(f"model_type={kind!r} makes another layer: only llama can be computed here")
    kinds, window = layer.get("layer_types"), layer.get("sliding_window")
    if kinds not in (None, ["full_attention"]):
        raise GraftError(f"layer_types={kinds} makes another network: only full_attention can be computed here")
    if window is not None and kinds is None and layer.get("use_sliding_window") is not False:
        raise GraftError(f"sliding_window={window} makes another network: only full_attention can be computed here")


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


def _our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of `DraftHead`."""
    return {re.sub(r"^layers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}


def _read_tensors(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Where the tensors lie, and the tensors."""
    path, pickled = directory / WEIGHTS_FILE, directory / PICKLED_FILE
    if not path.is_file() and pickled.is_file():
        return pickled, _read_pickled(pickled)
    return path, read_safetensors(path, REMEDY)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The official heads of EAGLE are such files. Nothing but tensors is read from one: no code runs."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in whatever way its bytes say
        raise GraftError(f"{path} is truncated, corrupt, or holds more than tensors ({error}); {REMEDY}") from error
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise GraftError(f"{path} must hold tensors by name; {REMEDY}")
    return values
