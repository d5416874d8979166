"""The configuration of a block head on disk, written natively and in speculators' dialect, and read in either.

A head with fill-in slots is written as `DFlashDraftModel`, one with next-token slots or a Markov bias as
`Qwen3DSparkModel`. SpecForge's `DSparkDraftModel` is the latter, whose keys stand in dflash_config or dspark_config;
it is read, too. What decides how it is computed is always written where both vLLM and SGLang read it: `is_causal`
and `layer_types` at the top level, and the layout of the slots.

speculators' dialect nests the layers' configuration, as that of its EAGLE-3 heads does, and counts the aux layers
from 1. It is read as the native configuration of the same head. Where the target's name is known and speculators can
compute the head, its keys stand beside the native ones: `vllm serve HEAD` then finds the target by itself.
"""

from typing import Any

import torch

from ...errors import GraftError
from ..base import check_whole
from ..checkpoint import (
    HARMLESS,
    NESTED,
    SPECULATORS,
    Verifier,
    check_keys,
    given_or,
    of_speculators,
    rope_and_dtype,
    rope_of,
)
from .config import MOST_LAYERS, BlockHeadConfig
from .keys import (
    ARCHITECTURES,
    AUX_IDS,
    COMPUTED,
    COMPUTED_NESTED,
    DFLASH,
    DSPARK,
    FROM_ANCHOR,
    FULL,
    LAYER,
    LAYOUT,
    MODEL_TYPES,
    NON_CAUSAL,
    OF_TRAINING,
    ONLY_OF_SPECULATORS,
    READ,
    READ_NESTED,
    READ_OF_SPECULATORS,
    SLIDING,
    TYPES,
)
from .view import SlidingWindow


def block_config_to_dict(
    config: BlockHeadConfig, dtype: torch.dtype, verifier: Verifier | None = None
) -> dict[str, Any]:
    """The native configuration that vLLM and SGLang load, and beside it that of speculators, where there is one.

    Args:
        verifier: the target; None where its name is not known.
    """
    native = _native_to_dict(config, dtype)
    return native if verifier is None else native | _nested_to_dict(config, native, verifier)


def _native_to_dict(config: BlockHeadConfig, dtype: torch.dtype) -> dict[str, Any]:
    reads = {"target_layer_ids": list(config.aux_layer_ids), "mask_token_id": config.mask_token_id}
    is_dspark = config.sample_from_anchor or config.markov_rank > 0
    values = {
        "architectures": [DSPARK if is_dspark else DFLASH],
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
        **_views_to_dict(config),
    }
    if not is_dspark:
        causal = {} if config.causal is None else {"causal": config.causal}
        return values | {"dflash_config": reads | causal | {LAYOUT: False}}
    markov = {"markov_rank": config.markov_rank, "markov_head_type": "vanilla", "enable_confidence_head": False}
    return values | reads | markov | {LAYOUT: config.sample_from_anchor}


def _nested_to_dict(config: BlockHeadConfig, native: dict[str, Any], verifier: Verifier) -> dict[str, Any]:
    """What speculators' dialect has beside the native keys; nothing where it has no word for what the slots see."""
    if not sees_as_in_speculators(config):
        return {}
    layer = {name: native[name] for name in LAYER}
    kind = "dspark" if native["architectures"] == [DSPARK] else "dflash"
    return {
        **of_speculators(kind, config.drafts, layer, verifier),
        AUX_IDS: [layer_id + 1 for layer_id in config.aux_layer_ids],
        "mask_token_id": config.mask_token_id,
        LAYOUT: config.sample_from_anchor,
        NON_CAUSAL: config.causal is False,
    }


def sees_as_in_speculators(config: BlockHeadConfig) -> bool:
    """Whether `_views_of_speculators` can say what the slots see."""
    if config.sliding is not None and not config.sliding.from_anchor:
        return False
    slides = 0 if config.sliding is None else len(config.sliding.layers)
    return config.causal in (False, _default_causal(slides, config.num_hidden_layers))


def _views_to_dict(config: BlockHeadConfig) -> dict[str, Any]:
    """What the slots of each layer see. Engines read an absent `is_causal` as "in sliding layers"."""
    sliding = config.sliding
    slides = () if sliding is None else sliding.layers
    values: dict[str, Any] = {} if config.causal is None else {"is_causal": config.causal}
    # SGLang reads is_causal only beside a list of layer_types.
    values["layer_types"] = [SLIDING if layer in slides else FULL for layer in range(config.num_hidden_layers)]
    values |= {"sliding_window": sliding and sliding.size, "use_sliding_window": sliding is not None}
    return values | ({FROM_ANCHOR: True} if sliding is not None and sliding.from_anchor else {})


def block_config_from_dict(values: dict[str, Any], target_layers: int | None = None) -> BlockHeadConfig:
    """Reads what `block_config_to_dict`, DFlash, DSpark and speculators store.

    Raises:
        GraftError: a key is missing, contradicts another, or describes a head that this module is not.
    """
    if SPECULATORS not in values or "hidden_size" not in values:
        return _one_dialect(values, target_layers)
    flat = {name: value for name, value in values.items() if name not in ONLY_OF_SPECULATORS}
    native = _one_dialect(flat, target_layers)
    known = READ_OF_SPECULATORS | COMPUTED.keys() | HARMLESS | OF_TRAINING
    nested = {name: value for name, value in values.items() if name in known}
    if _one_dialect(nested, native.num_target_layers) != native:
        raise GraftError(f"the top level and {NESTED} describe different heads")
    return native


def _one_dialect(values: dict[str, Any], target_layers: int | None) -> BlockHeadConfig:
    if SPECULATORS in values:
        values = _native(values)
    if target_layers is not None:
        values = {"num_target_layers": target_layers} | values
    names = values.get("architectures")
    if names not in [[name] for name in ARCHITECTURES]:
        raise GraftError(
            f"architectures={names} makes another network: only {', '.join(ARCHITECTURES)} can be computed here"
        )
    check_keys(values, READ, COMPUTED, HARMLESS | OF_TRAINING)
    nested = _nested(values, is_dspark=names != [DFLASH])
    if given_or(values, "model_type", "qwen3") not in MODEL_TYPES:
        raise GraftError(
            f"model_type={values['model_type']!r} makes another layer: only {', '.join(MODEL_TYPES)} can be computed "
            "here"
        )
    if given_or(values, "target_hidden_size", values["hidden_size"]) != values["hidden_size"]:
        raise GraftError("only heads that are as wide as their target can be loaded")
    heads, markov = values["num_attention_heads"], _agreed("markov_rank", values, nested, default=0)
    return BlockHeadConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
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
        sample_from_anchor=_layout([values.get(LAYOUT), nested.get(LAYOUT)], names != [DFLASH], bool(markov)),
        markov_rank=markov,
        sliding=_sliding(values, nested),
        rms_norm_eps=values["rms_norm_eps"],
        rope_parameters=rope_of(values),
    )


def _nested(values: dict[str, Any], is_dspark: bool) -> dict[str, Any]:
    """What dflash_config and dspark_config say together.

    Raises:
        GraftError: a key that is not known, or of another network.
    """
    nested: dict[str, Any] = {}
    for place in ("dflash_config", "dspark_config"):
        part = values.get(place) or {}
        check_keys(part, READ_NESTED, COMPUTED_NESTED | {"projector_type": "dspark"}, OF_TRAINING)
        for name, value in part.items():
            if value is not None and nested.setdefault(name, value) != value:
                raise GraftError(f"dflash_config and dspark_config say different things of {name}")
    if not is_dspark and "projector_type" in nested:
        raise GraftError(
            f"projector_type={nested['projector_type']!r} and {DFLASH}: such a head's tensors are not known"
        )
    return nested


def _agreed(name: str, *places: dict[str, Any], default: Any = None) -> Any:
    """The one value that a key has in whichever places have it.

    Raises:
        GraftError: two places say different things, or none says anything and there is no default.
    """
    given = [place[name] for place in places if place.get(name) is not None]
    if not given:
        if default is not None:
            return default
        raise GraftError(f"{name} is missing, at the top level as in dflash_config")
    if any(value != given[0] for value in given):
        raise GraftError(f"the top level and dflash_config say different things of {name}: {given}")
    return given[0]


def _sliding(values: dict[str, Any], nested: dict[str, Any]) -> SlidingWindow | None:
    """The layers with a sliding window: those that layer_types names, or with use_swa all, where it names none.

    Raises:
        GraftError: kinds of layers that are not known or not one for each layer, or a window that is not said.
    """
    kinds, count, uses = values.get("layer_types"), values["num_hidden_layers"], values.get("use_sliding_window")
    if kinds is not None and (len(kinds) != count or not all(kind in (FULL, SLIDING) for kind in kinds)):
        raise GraftError(f"layer_types={kinds} makes another network: there must be {count}, each {FULL} or {SLIDING}")
    forced, window, own = nested.get("use_swa"), values.get("sliding_window"), nested.get("swa_window_size")
    if type(forced) is not bool and forced is not None:
        raise GraftError(f"use_swa={forced!r} must be true or false")
    layers = tuple(layer for layer, kind in enumerate(kinds or ()) if kind == SLIDING)
    if not layers and not forced:
        if kinds is None and window is not None and uses is not False:
            raise GraftError(f"sliding_window={window}, but not in which layers: write layer_types")
        return None
    if own is not None and window not in (None, own):
        raise GraftError(f"sliding_window={window} and swa_window_size={own}: engines differ in which of them counts")
    # transformers forgets sliding_window unless use_sliding_window is true.
    if own is None and (window is None or uses is not True):
        raise GraftError(f"layer_types={kinds} needs use_sliding_window=true and a sliding_window")
    check_whole("num_hidden_layers", count, 1, MOST_LAYERS)
    size: Any = window if own is None else own
    return SlidingWindow(layers or tuple(range(count)), size, given_or(values, FROM_ANCHOR, False))


def _causal(values: dict[str, Any], nested: dict[str, Any]) -> bool | None:
    """Whether slots do not see those after them: by the keys of vLLM and SGLang and by JetSpec's, else where
    layer_types names a sliding window."""
    said = [values.get("is_causal"), nested.get("causal"), nested.get("causal_head")]
    given = [value for value in said if value is not None]
    if any(value != given[0] for value in given):
        raise GraftError(f"is_causal, dflash_config.causal and dflash_config.causal_head say different things: {said}")
    slides = (values.get("layer_types") or []).count(SLIDING)
    return given[0] if given else _default_causal(slides, values["num_hidden_layers"])


def _default_causal(slides: int, layers: int) -> bool | None:
    """What is causal where nothing says so: the layers with a sliding window."""
    return {0: False, layers: True}.get(slides)


def _layout(said: list[Any], is_dspark: bool, has_markov: bool) -> bool:
    """Whether slots predict the token after them.

    Args:
        said: of it, at the top level and in dflash_config.

    Raises:
        GraftError: the key contradicts the architecture, or is missing where engines take different defaults.
    """
    given = [value for value in said if value is not None]
    if not given and is_dspark and not has_markov:
        raise GraftError(
            f"{LAYOUT} is missing, and engines differ in what a {DSPARK} without a Markov head then predicts: write "
            f"{LAYOUT}: true, or false for a head whose first slot is unused"
        )
    if any(value is not given[0] for value in given) or (given and given[0] and not is_dspark):
        raise GraftError(f"{LAYOUT}={given[0]} and {DSPARK if is_dspark else DFLASH}: no engine computes such a head")
    return given[0] if given else is_dspark


def _native(values: dict[str, Any]) -> dict[str, Any]:
    """The native configuration of a head in speculators' dialect, but for its target's depth.

    Raises:
        GraftError: another family, or what this module does not compute.
    """
    kind, layer = values[SPECULATORS], dict(values[NESTED])
    if kind not in TYPES:
        raise GraftError(f"of speculators' block heads only {' and '.join(TYPES)} can be loaded, not {kind!r}")
    check_keys(values, READ_OF_SPECULATORS, COMPUTED, HARMLESS | OF_TRAINING)
    if min(values[AUX_IDS]) < 1:
        raise GraftError(f"{AUX_IDS}={values[AUX_IDS]}: the target's embeddings (0) are not read here")
    from_anchor = given_or(values, LAYOUT, False if kind == "dflash" else None)
    if from_anchor is None:
        raise GraftError(f"{LAYOUT} is missing, and speculators and vLLM differ in what that means")
    # Its layers are Qwen3's, whichever configuration describes them, and it makes them with one RoPE.
    layer |= {"architectures": [DSPARK if from_anchor or kind == "dspark" else DFLASH], "model_type": "qwen3"}
    ropes = layer.get("rope_parameters") or {}
    layer |= {"rope_parameters": ropes.get(SLIDING, ropes)}
    names = ("block_size", "draft_vocab_size", "mask_token_id", "markov_rank", "target_hidden_size")
    layer |= {name: values[name] for name in names if name in values}
    layer |= {"target_layer_ids": [place - 1 for place in values[AUX_IDS]], LAYOUT: from_anchor}
    return layer | _views_of_speculators(values, layer)


def _views_of_speculators(values: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Layers with full attention are never causal, those with a sliding window unless it is said."""
    if SLIDING not in (layer.get("layer_types") or []):
        return {"is_causal": False}
    if values.get(NON_CAUSAL) is None:
        raise GraftError(f"{NON_CAUSAL} is missing, and speculators and vLLM differ in what that means")
    return {FROM_ANCHOR: True} | ({"is_causal": False} if values[NON_CAUSAL] else {})
