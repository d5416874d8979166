"""What transformers' own `generate` makes of a request's settings, up to the first pass of the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode

from .errors import GraftError

HARMLESS: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
    "is_assistant": (None, False),
    "return_dict_in_generate": (None, False),
    # Which of these holds the keys and values changes no token; Graft has caches of its own.
    "cache_implementation": (None, "dynamic", "static", "hybrid"),
}
"""Settings that Graft cannot follow, with the values of each that change nothing."""
OTHER_MODES: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "constraints": None,
    "force_words_ids": None,
}
"""Settings that choose another way to decode than greedily or by sampling, with the value of each that does not."""
FROM_MODEL = "What the call does not set comes from the model's generation_config"


@dataclass
class Prepared:
    """A request as transformers hands it to its decoding loop.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S].
        processors: all of them, in order; temperature, top-k and the like included.
        criteria: all of them; lengths and ends of sequence included.
        config: every setting, with the values that a plain `generate` would use.
    """

    input_ids: Tensor
    attention_mask: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


def prepare(
    model: Any,
    settings: dict[str, Any],
    generation_config: GenerationConfig | None = None,
    tokenizer: Any | None = None,
    stopping_criteria: Iterable[Any] = (),
) -> Prepared:
    """Has transformers prepare a request; the model does not run.

    Args:
        settings: arguments of `generate`, inputs among them.
        generation_config: counts where `settings` say nothing, and before the model's own.
        tokenizer: for stop strings, which transformers loses on the way to a custom decoding function.

    Raises:
        GraftError: a setting that Graft cannot follow, or one that transformers refuses.
    """
    found: list[Prepared] = []

    def keep(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        mask = prepared.get("attention_mask")  # transformers drops one that hides nothing
        mask = torch.ones_like(input_ids) if mask is None else mask
        names = ("logits_processor", "stopping_criteria", "generation_config")
        found.append(Prepared(input_ids, mask, *(prepared[name] for name in names)))
        return input_ids

    try:
        criteria = StoppingCriteriaList(stopping_criteria)
        in_effect = _in_effect(model, settings, generation_config, ("stop_strings", *HARMLESS))
        _check_harmless(in_effect)
        stops = in_effect["stop_strings"]
        if stops is not None and not any(type(one) is StopStringCriteria for one in criteria):
            criteria.extend(stop_criteria(stops, tokenizer))
        # Done with, or none of Graft's business.
        settings |= {name: None for name in ("stop_strings", "cache_implementation") if in_effect[name] is not None}
        settings |= {"logits_processor": LogitsProcessorList(settings.get("logits_processor") or ())}
        GenerationMixin.generate(
            model, custom_generate=keep, generation_config=generation_config, stopping_criteria=criteria, **settings
        )
    except GraftError:
        raise
    except Exception as error:  # processors, criteria and checks of transformers raise many kinds
        reason = str(error).rstrip(".")
        raise GraftError(f"transformers' generate refuses this request: {reason}. {FROM_MODEL}") from error
    _check_mode(found[0].config)
    return found[0]


def stop_criteria(strings: str | Sequence[str], tokenizer: Any | None) -> list[StopStringCriteria]:
    """What finds these strings; nothing where the tokens of the tokenizer spell none of them, which then never come.

    Raises:
        GraftError: an empty string, or no tokenizer to find them with.
    """
    if not isinstance(strings, Iterable):
        raise GraftError(f"stop_strings={strings!r}: pass a text or a list of texts")
    strings = [strings] if isinstance(strings, str) else list(strings)
    for one in strings:
        if not isinstance(one, str) or not one:
            raise GraftError(f"stop_strings has {one!r}: every one must be a text that is not empty; leave it out")
    if not strings:
        return []
    if tokenizer is None:
        raise GraftError(f"stop_strings need a tokenizer: pass tokenizer=. {FROM_MODEL}")
    try:
        return [StopStringCriteria(tokenizer, strings)]
    except ValueError:
        return []


def _in_effect(
    model: Any, settings: dict[str, Any], generation_config: GenerationConfig | None, names: Iterable[str]
) -> dict[str, Any]:
    """The values of some settings, by the order in which `generate` asks; None where nothing says one."""
    values: dict[str, Any] = {}
    for name in names:
        of_configs = [getattr(config, name, None) for config in (generation_config, model.generation_config)]
        values[name] = settings.get(name, next((value for value in of_configs if value is not None), None))
    return values


def _check_harmless(in_effect: dict[str, Any]) -> None:
    for name, harmless in HARMLESS.items():
        if in_effect[name] not in harmless:
            raise GraftError(f"{name}={in_effect[name]} is not supported with Graft: leave it out. {FROM_MODEL}")


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        values = {name: getattr(config, name, None) for name in OTHER_MODES}
        asked = ", ".join(f"{name}={value}" for name, value in values.items() if value not in (None, OTHER_MODES[name]))
        raise GraftError(
            f"{mode.value} is not supported with Graft ({asked}): decode greedily or sample, with num_beams=1 and no "
            f"assistant. {FROM_MODEL}"
        )
