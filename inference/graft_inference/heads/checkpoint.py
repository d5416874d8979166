"""What the checkpoints of every family share: their files, keys that are refused, and RoPE's parameters."""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GraftError
from ..files import read_json, replace_file

Config = TypeVar("Config")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MASK_EMBEDDING = "mask_embedding.pt"
SPECULATORS = "speculators_model_type"
NESTED = "transformer_layer_config"
OF_SPECULATORS = (SPECULATORS, "speculators_version", "speculators_config", NESTED)
"""Keys that speculators' dialect alone has, of any family."""
REMEDY = "copy the head again, or train it again with graft distill"

HARMLESS = frozenset({
    "_name_or_path", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embed_requires_grad", "eos_token_id", "experts_per_token", "id2label", "initializer_range", "label2id",
    "max_window_layers", "num_local_experts", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "reuse_target_lm_head", "speculators_config",
    "speculators_version", "target_model_type", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Keys of published heads that do not change a pass of this layer, whose tensors are all known."""
ROPE = frozenset({
    "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
})  # fmt: skip
ROPE_OF_IMAGES = frozenset({"mrope_section", "mrope_interleaved"})
"""Positions of images; those of text are the same with and without them."""


@dataclass(frozen=True)
class Verifier:
    """A head's target as speculators' dialect names it; `vllm serve HEAD` then serves that.

    Attributes:
        name_or_path: Hub id or directory.
        architectures: as its own configuration has them.
    """

    name_or_path: str | None = None
    architectures: tuple[str, ...] = ()


def of_speculators(algorithm: str, drafts: int, layer: dict[str, Any], verifier: Verifier) -> dict[str, Any]:
    """The keys of `OF_SPECULATORS`.

    Args:
        drafts: tokens that vLLM drafts where its user says nothing else.
        layer: the configuration of the head's layers.
    """
    return {
        SPECULATORS: algorithm,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafts}],
            "verifier": asdict(verifier),
        },
        NESTED: layer,
    }


def save_files(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes a head's two files into `directory`, each aside and then renamed; other files there stay."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(directory / WEIGHTS_FILE, lambda aside: save_file(tensors, str(aside), metadata={"format": "pt"}))
    replace_file(
        directory / CONFIG_FILE,
        lambda aside: aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
    )


def read_config(directory: Path, parse: Callable[[dict[str, Any]], Config], what: str) -> Config:
    """Reads a head's `config.json` and returns what `parse` makes of it.

    Args:
        parse: takes the file's values; may raise KeyError, TypeError and the like where they are malformed.
        what: the kind of head that is expected, for error messages.

    Raises:
        GraftError: names the file, whatever is wrong with it.
    """
    path = Path(directory) / CONFIG_FILE
    values = read_json(path, REMEDY)
    try:
        return parse(values)
    except KeyError as error:
        raise GraftError(f"{path} lacks the key {error}; {REMEDY}") from error
    except GraftError as error:
        raise GraftError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise GraftError(f"{path} does not describe {what} ({error}); {REMEDY}") from error


def rope_and_dtype(rope_parameters: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The keys of RoPE and of the weights' dtype, for engines older and newer than transformers 5."""
    scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "rope_theta": rope_parameters.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": dict(rope_parameters),
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }


def given_or(values: dict[str, Any], name: str, default: Any) -> Any:
    """null means what an absent key does."""
    value = values.get(name)
    return default if value is None else value


def check_keys(
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


def rope_of(layer: dict[str, Any], kind: str = "full_attention") -> dict[str, Any]:
    """RoPE's parameters, of the transformers 5 kind.

    Args:
        kind: of `layer_types`, where layers differ in their RoPE.

    Raises:
        GraftError: the two kinds of keys contradict each other, or one is not known.
    """
    new, old = layer.get("rope_parameters") or {}, layer.get("rope_scaling") or {}
    if new and all(isinstance(value, dict) for value in new.values()):
        if kind not in new:
            raise GraftError(f"rope_parameters={new} has none for {kind}")
        new = new[kind]
    given = [_named_rope(part) for part in (new, old) if part]
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


def _named_rope(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that change the frequencies of text."""
    kinds = {values[name] for name in ("rope_type", "type") if isinstance(values.get(name), str)}
    if len(kinds) > 1:
        raise GraftError(f"rope_type and type say different things: {' and '.join(sorted(kinds))}")
    kind = values.get("rope_type", values.get("type"))
    check_keys(values, ROPE | ROPE_OF_IMAGES | {"rope_type", "type"}, {"partial_rotary_factor": 1})
    if not isinstance(kind, str | None):
        raise GraftError(f"rope_type={kind!r} must be a name")
    rope = {name: value for name, value in values.items() if name in ROPE and value is not None}
    # Text alone has one position, in whatever part of a multimodal RoPE.
    return ({} if kind is None else {"rope_type": "default" if kind == "mrope" else kind}) | rope
