"""The draft head on disk: `config.json` and `model.safetensors`, written in one dialect and read in two.

Ours is SGLang's and the official EAGLE's: a flat Llama configuration, the layer named `midlayer`. vLLM's
"speculators" dialect nests that configuration and names the layer `layers.0`. The ids of the aux layers have
two conventions: id i = *output* of layer i inside `eagle_config` (SGLang, ours), id i + 1 = *input* of that next
layer at the top level (vLLM). We write both.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import GraftError
from ...files import read_json, read_safetensors, replace_file
from .model import DraftHead, DraftHeadConfig, default_aux_layer_ids

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = "speculators_model_type"
REMEDY = "copy the head again, or train it again with graft distill"

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
HARMLESS = frozenset({
    "_name_or_path", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embed_requires_grad", "eos_token_id", "experts_per_token", "id2label", "initializer_range", "label2id",
    "max_window_layers", "num_local_experts", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "reuse_target_lm_head", "speculators_config",
    "speculators_version", "target_model_type", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Keys of published heads that do not change a pass of this layer, whose tensors are all known."""
EAGLE_CONFIG = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}
"""The same within eagle_config, as NVIDIA's heads have it."""
ROPE = frozenset({
    "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
})  # fmt: skip
ROPE_OF_IMAGES = frozenset({"mrope_section", "mrope_interleaved"})
"""Positions of images; those of text are the same with and without them."""


def save_head(head: DraftHead, directory: Path) -> None:
    """Writes the head into `directory`, each file aside and then renamed; other files there stay."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    config = head_config_to_dict(head.config, head.lm_head.weight.dtype)
    replace_file(directory / WEIGHTS_FILE, lambda aside: save_file(tensors, str(aside), metadata={"format": "pt"}))
    replace_file(
        directory / CONFIG_FILE,
        lambda aside: aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
    )


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
    path = directory / CONFIG_FILE
    values = read_json(path, REMEDY)
    try:
        return head_config_from_dict(values, target_layers)
    except KeyError as error:
        raise GraftError(f"{path} lacks the key {error}; {REMEDY}") from error
    except GraftError as error:
        raise GraftError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise GraftError(f"{path} does not describe a draft head ({error}); {REMEDY}") from error


def head_config_to_dict(config: DraftHeadConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The flat Llama configuration that SGLang and vLLM load."""
    rope = dict(config.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    dtype_name = str(dtype).removeprefix("torch.")
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
        # Engines older than transformers 5 read the pair, newer ones `rope_parameters`.
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": rope,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
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
        _check_keys(part, READ, COMPUTED, HARMLESS)
    _check_keys(values.get("eagle_config") or {}, {AUX_IDS}, EAGLE_CONFIG)
    _check_layer(layer, nested)
    hidden_size, heads = layer["hidden_size"], layer["num_attention_heads"]
    if _given(values, "target_hidden_size", hidden_size) != hidden_size:
        raise GraftError("only heads that are as wide as their target can be loaded")
    return DraftHeadConfig(
        hidden_size=hidden_size,
        intermediate_size=layer["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=_given(layer, "num_key_value_heads", heads),
        head_dim=_given(layer, "head_dim", hidden_size // heads),
        vocab_size=layer["vocab_size"],
        draft_vocab_size=_given(values, "draft_vocab_size", layer["vocab_size"]),
        aux_layer_ids=_aux_layer_ids(values, target_layers),
        max_position_embeddings=layer["max_position_embeddings"],
        rms_norm_eps=layer["rms_norm_eps"],
        rope_parameters=_rope(layer),
        # Without the key a flat configuration means False (SGLang), a nested one True (vLLM).
        norm_before_residual=_given(values, "norm_before_residual", nested),
    )


def _given(values: dict[str, Any], name: str, default: Any) -> Any:
    """null means what an absent key does."""
    value = values.get(name)
    return default if value is None else value


def _check_keys(
    values: dict[str, Any], read: Collection[str], computed: dict[str, Any], harmless: Collection[str] = ()
) -> None:
    """Raises GraftError for a key that changes what is computed, or that may: it is not known here."""
    for name, value in values.items():
        if name in computed and value is not None and value != computed[name]:
            raise GraftError(f"{name}={value!r} makes another network: only {computed[name]!r} can be computed here")
        if name not in computed and name not in read and name not in harmless and value is not None:
            raise GraftError(
                f"{name}={value!r} is not known here and may make another network: take the key out if it does not "
                "change what the head computes"
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


def _rope(layer: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, of the transformers 5 kind.

    Raises:
        GraftError: the two kinds of keys contradict each other, or one is not known.
    """
    new, old = layer.get("rope_parameters") or {}, layer.get("rope_scaling") or {}
    if new and all(isinstance(value, dict) for value in new.values()):
        if "full_attention" not in new:
            raise GraftError(f"rope_parameters={new} has none for full_attention")
        new = new["full_attention"]
    given = [_rope_of(part) for part in (new, old) if part]
    theta = layer.get("rope_theta")
    if theta is not None:
        given.append({"rope_theta": theta})
    rope: dict[str, Any] = {}
    for part in given:
        for name, value in part.items():
            if rope.setdefault(name, value) != value:
                raise GraftError(f"rope_parameters, rope_scaling and rope_theta say different things of {name}")
    rope = {"rope_type": "default", "rope_theta": 10000.0} | rope
    if rope["rope_type"] == "default" and len(rope) > 2:
        raise GraftError(f"RoPE is scaled by {rope}, but of which type is not said")
    return rope


def _rope_of(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that change the frequencies of text."""
    kinds = {values[name] for name in ("rope_type", "type") if isinstance(values.get(name), str)}
    if len(kinds) > 1:
        raise GraftError(f"rope_type and type say different things: {' and '.join(sorted(kinds))}")
    kind = values.get("rope_type", values.get("type"))
    _check_keys(values, ROPE | ROPE_OF_IMAGES | {"rope_type", "type"}, {"partial_rotary_factor": 1})
    if not isinstance(kind, str | None):
        raise GraftError(f"rope_type={kind!r} must be a name")
    rope = {name: value for name, value in values.items() if name in ROPE and value is not None}
    # Text alone has one position, in whatever part of a multimodal RoPE.
    return ({} if kind is None else {"rope_type": "default" if kind == "mrope" else kind}) | rope


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
