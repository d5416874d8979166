"""The draft head on disk: `config.json` and `model.safetensors`, written in one dialect and read in two.

Ours is SGLang's and the official EAGLE's: a flat Llama configuration, the layer named `midlayer`. vLLM's
"speculators" dialect nests that configuration and names the layer `layers.0`. The ids of the tapped layers have
two conventions: id i = *output* of layer i inside `eagle_config` (SGLang, ours), id i + 1 = *input* of that next
layer at the top level (vLLM). We write both.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .draft_head import EMBEDDINGS, DraftHead, DraftHeadConfig, default_tapped_layers
from .errors import GraftError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = "speculators_model_type"
REMEDY = "copy the head again, or train it again with recipes/distill.py"


def save_head(head: DraftHead, directory: Path) -> None:
    """Writes the head into `directory`, each file aside and then renamed; other files there stay."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    config = head_config_to_dict(head.config, head.lm_head.weight.dtype)
    _replace(directory / WEIGHTS_FILE, lambda aside: save_file(tensors, str(aside), metadata={"format": "pt"}))
    _replace(
        directory / CONFIG_FILE,
        lambda aside: aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
    )


def load_head(directory: Path, target_layers: int | None = None) -> DraftHead:
    """Reads a head of either dialect strictly, in the dtype it was saved in, on the CPU.

    Args:
        target_layers: layers of its target, from which follows what a head taps that does not say so.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the two files do not describe one head.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE, target_layers)
    weights = directory / WEIGHTS_FILE
    tensors = _our_names(_read_tensors(weights), config)
    head = DraftHead(config, own_embeddings=EMBEDDINGS in tensors)
    try:
        head.load_checkpoint(tensors)
    except GraftError as error:
        raise GraftError(f"{weights}: {error}; {REMEDY}") from error
    return head.to(tensors["lm_head.weight"].dtype)


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
        "eagle_config": {AUX_IDS: list(config.tapped_layers), "use_aux_hidden_state": True},
        AUX_IDS: [layer + 1 for layer in config.tapped_layers],
    }


def head_config_from_dict(values: dict[str, Any], target_layers: int | None = None) -> DraftHeadConfig:
    """Reads what `head_config_to_dict`, the official EAGLE heads and vLLM's speculators store.

    Raises:
        GraftError: a key is missing, contradicts another, or describes a head that this module is not.
    """
    nested = SPECULATORS in values
    if nested and (values[SPECULATORS] != "eagle3" or values.get("norm_before_fc")):
        raise GraftError("of the speculators heads only eagle3 without norm_before_fc can be loaded")
    layer = values["transformer_layer_config"] if nested else values
    hidden_size, heads = layer["hidden_size"], layer["num_attention_heads"]
    if layer.get("num_hidden_layers", 1) != 1 or (values.get("target_hidden_size") or hidden_size) != hidden_size:
        raise GraftError("only heads of one layer that are as wide as their target can be loaded")
    if layer.get("attention_bias") or layer.get("mlp_bias") or layer.get("hidden_act", "silu") != "silu":
        raise GraftError("only heads without biases and with silu activation can be loaded")
    rope = layer.get("rope_parameters") or {
        **(layer.get("rope_scaling") or {"rope_type": "default"}),
        "rope_theta": layer.get("rope_theta", 10000.0),
    }
    return DraftHeadConfig(
        hidden_size=hidden_size,
        intermediate_size=layer["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=layer.get("num_key_value_heads", heads),
        head_dim=layer.get("head_dim") or hidden_size // heads,
        vocab_size=layer["vocab_size"],
        draft_vocab_size=values.get("draft_vocab_size") or layer["vocab_size"],
        tapped_layers=_tapped_layers(values, target_layers),
        max_position_embeddings=layer["max_position_embeddings"],
        rms_norm_eps=layer["rms_norm_eps"],
        rope_parameters=dict(rope),
        # Without the key a flat configuration means False (SGLang), a nested one True (vLLM).
        norm_before_residual=values.get("norm_before_residual", nested),
    )


def _tapped_layers(values: dict[str, Any], target_layers: int | None) -> tuple[int, ...]:
    """The layers whose outputs feed the head, from whichever convention the configuration follows."""
    outputs, inputs = (values.get("eagle_config") or {}).get(AUX_IDS), values.get(AUX_IDS)
    if outputs is not None:
        tapped = tuple(int(layer) for layer in outputs)
    elif inputs is not None:
        tapped = tuple(int(layer) - 1 for layer in inputs)
    elif target_layers is not None:
        return default_tapped_layers(target_layers)
    else:
        raise GraftError(f"{AUX_IDS} is missing: which target layers feed the head is unknown")
    if inputs is not None and list(inputs) != [layer + 1 for layer in tapped]:
        raise GraftError(f"the top-level {AUX_IDS}={inputs} must be eagle_config's {list(tapped)} plus one")
    if min(tapped, default=0) < 0:
        raise GraftError(f"the head taps the target's embeddings ({AUX_IDS}), which is not supported")
    return tapped


def _our_names(tensors: dict[str, torch.Tensor], config: DraftHeadConfig) -> dict[str, torch.Tensor]:
    """The tensors under the names of `DraftHead`, without vocabulary maps that map nothing."""
    named = {re.sub(r"^layers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}
    if config.draft_vocab_size == config.vocab_size:
        for name, identity in (("d2t", 0), ("t2d", 1)):
            if name in named and bool((named[name] == identity).all()):
                del named[name]
    return named


def _read_config(path: Path, target_layers: int | None) -> DraftHeadConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return head_config_from_dict(values, target_layers)
    except FileNotFoundError as error:
        raise GraftError(f"{path} is missing; {REMEDY}") from error
    except KeyError as error:
        raise GraftError(f"{path} lacks the key {error}; {REMEDY}") from error
    except GraftError as error:
        raise GraftError(f"{path}: {error}; {REMEDY}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise GraftError(f"{path} does not describe a draft head ({error}); {REMEDY}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        pickled = path.with_name(PICKLED_FILE)
        if pickled.is_file():
            return _read_pickled(pickled)
        raise GraftError(f"{path} is missing; {REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise GraftError(f"{path} is truncated or corrupt ({error}); {REMEDY}") from error


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The official heads of EAGLE are such files. Nothing but tensors is read from one: no code runs."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in whatever way its bytes say
        raise GraftError(f"{path} is truncated, corrupt, or holds more than tensors ({error}); {REMEDY}") from error
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise GraftError(f"{path} must hold tensors by name; {REMEDY}")
    return values


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.replace(path)
