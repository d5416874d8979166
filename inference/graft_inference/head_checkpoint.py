"""The draft head on disk: the SGLang / official EAGLE dialect, `config.json` and `model.safetensors`.

The embeddings are the target's and are not saved. The ids of the tapped layers stand in the configuration
twice, because engines read two conventions: id i = *output* of layer i inside `eagle_config` (SGLang, ours),
id i + 1 = *input* of that next layer at the top level (vLLM).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .draft_head import DraftHead, DraftHeadConfig
from .errors import GraftError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
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


def load_head(directory: Path) -> DraftHead:
    """Reads a head strictly, in the dtype it was saved in, on the CPU.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the two files do not describe one head.
    """
    directory = Path(directory)
    head = DraftHead(_read_config(directory / CONFIG_FILE))
    weights = directory / WEIGHTS_FILE
    tensors = _read_tensors(weights)
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


def head_config_from_dict(values: dict[str, Any]) -> DraftHeadConfig:
    """Reads what `head_config_to_dict` and the official EAGLE heads store.

    Raises:
        GraftError: a key is missing, contradicts another, or describes a head that this module is not.
    """
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("num_hidden_layers", 1) != 1 or values.get("target_hidden_size", hidden_size) != hidden_size:
        raise GraftError("only heads of one layer that are as wide as their target can be loaded")
    eagle = values.get("eagle_config", {})
    if AUX_IDS not in eagle:
        raise GraftError(f"eagle_config.{AUX_IDS} is missing: which target layers feed the head is unknown")
    tapped = tuple(int(layer) for layer in eagle[AUX_IDS])
    if list(values.get(AUX_IDS, [layer + 1 for layer in tapped])) != [layer + 1 for layer in tapped]:
        raise GraftError(f"the top-level {AUX_IDS}={values[AUX_IDS]} must be eagle_config's {list(tapped)} plus one")
    rope = values.get("rope_parameters") or {
        **(values.get("rope_scaling") or {"rope_type": "default"}),
        "rope_theta": values.get("rope_theta", 10000.0),
    }
    return DraftHeadConfig(
        hidden_size=hidden_size,
        intermediate_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim") or hidden_size // heads,
        vocab_size=values["vocab_size"],
        draft_vocab_size=values.get("draft_vocab_size", values["vocab_size"]),
        tapped_layers=tapped,
        max_position_embeddings=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope_parameters=dict(rope),
        # A flat configuration without the key means False (SGLang); vLLM would assume True.
        norm_before_residual=values.get("norm_before_residual", False),
    )


def _read_config(path: Path) -> DraftHeadConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return head_config_from_dict(values)
    except FileNotFoundError as error:
        raise GraftError(f"{path} is missing; {REMEDY}") from error
    except KeyError as error:
        raise GraftError(f"{path} lacks the key {error}; {REMEDY}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise GraftError(f"{path} does not describe a draft head ({error}); {REMEDY}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise GraftError(f"{path} is missing; {REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise GraftError(f"{path} is truncated or corrupt ({error}); {REMEDY}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.replace(path)
