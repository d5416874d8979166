"""What a caller asks of one generation."""

from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from operator import index as as_index
from typing import Any, Self, SupportsFloat, SupportsIndex

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from .decode.sampling import CONTEXT_FREE, Sampler
from .errors import GraftError
from .policy.plan import Plan
from .preparation import FROM_MODEL, prepare
from .prompts import NO_PAD_TOKEN, Prompts, check_vocabulary
from .target.model import Target

DEFAULT_NEW_TOKENS = 128
WHOLE = ("max_new_tokens", "max_length", "min_new_tokens", "top_k", "seed", "pad_token_id")
LEAST_TEMPERATURE = 1e-5
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
"""Settings that are numbers, of whatever library: whole ones, and others."""


@dataclass(frozen=True)
class Request:
    """One generation's settings; they mean what they mean in transformers' `generate`.

    What is None comes from the model's generation_config, and so does every setting that has no name here, such as
    no_repeat_ngram_size. Whether to sample, and how hot, and where a sequence ends, is the engine's to say. A
    setting that Graft cannot follow is refused by name.

    A batch gives each prompt what it would get alone: lengths are counted without padding, logits processors (of
    which each prompt has a copy of its own) and stopping criteria are asked prompt by prompt, [1, length].

    Attributes:
        max_new_tokens: 128 unless `max_length` is given, or the model's generation_config has either.
        temperature: 0 is greedy, whatever the model's generation_config says.
        method: one of `policy.METHODS`.
        seed: of the sampling; the same seed gives the same text, whatever the method. None: another each time.
            Prompt i of a batch, counted from 0, has the seed `seed + i`.
        plan: used instead of the method's own.
        max_length: tokens of prompt and continuation, instead of max_new_tokens.
        min_new_tokens: no end-of-sequence token before that many.
        top_k, top_p, min_p: keep the likeliest tokens when sampling; all, unless the generation_config has them.
        repetition_penalty: divides the scores of tokens that are there already; 1 for none.
        logits_processor: more of them, each called with every prefix of the output, as `generate` does.
        stop_strings: generation ends with the token that completes one of them; () for none. Needs a tokenizer.
        tokenizer: for stop_strings; the engine's own if it was loaded with one.
        stopping_criteria: asked after every token.
        streamer: gets the prompt, then every token as it is accepted.
        return_logprobs: whether `Generation.logprobs` is wanted.
        pad_token_id: fills up the shorter sequences of a batch; else the tokenizer's, the model's, or the end of
            sequence.
        prepared: transformers has prepared this request, as it does for `custom_generate`. Then nothing is added to its
            processors and criteria, they see the padding of prompts, and lengths include it.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    method: str = "graft"
    seed: int | None = None
    plan: Plan | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logits_processor: Iterable[LogitsProcessor] = ()
    stop_strings: str | Sequence[str] | None = None
    tokenizer: Any | None = None
    stopping_criteria: Iterable[Any] = ()
    streamer: BaseStreamer | None = None
    return_logprobs: bool = False
    pad_token_id: int | None = None
    prepared: bool = False

    def __post_init__(self) -> None:
        for name in (*WHOLE, *NUMBERS):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(name, value))
        for name in ("logits_processor", "stopping_criteria"):
            object.__setattr__(self, name, _callables(name, getattr(self, name) or ()))
        if self.temperature is None or not (self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE):
            raise GraftError(
                f"temperature={self.temperature!r}: 0 is greedy, {LEAST_TEMPERATURE:g} or more samples; scores divided "
                "by less overflow"
            )
        if not isinstance(self.plan, Plan | None):
            raise GraftError(f"plan={self.plan!r}: pass a Plan, or leave it out and name a method")
        if self.tokenizer is not None and not _is_callable(self.tokenizer, "convert_ids_to_tokens"):
            raise GraftError(f"tokenizer={self.tokenizer!r}: pass the target's, or leave it out")
        if self.streamer is not None and not (
            _is_callable(self.streamer, "put") and _is_callable(self.streamer, "end")
        ):
            raise GraftError(f"streamer={self.streamer!r}: pass one with put and end, such as a TextStreamer")
        if self.max_new_tokens is not None and self.max_length is not None:
            raise GraftError("max_new_tokens and max_length are two ways to say one thing: pass one of them")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise GraftError(f"max_new_tokens={self.max_new_tokens}: ask for at least 1")

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Makes a request of these settings; raises GraftError for one that is unknown or out of its range."""
        known = [field.name for field in fields(cls) if field.name != "prepared"]  # which is not the caller's to say
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise GraftError(
                f"{', '.join(unknown)}: no such setting; there are {', '.join(known)}. Others can stand in the model's "
                "generation_config"
            )
        return cls(**settings)

    def prompts(
        self,
        input_ids: Any,
        attention_mask: Any,
        model: Any,
        eos_token_ids: Set[int],
        tokenizer: Any | None,
    ) -> Prompts:
        """Reads the prompts, and decides what pads them.

        Raises:
            GraftError: what `Prompts.of` raises, or a batch with a streamer.
        """
        pad = self._pad(model, eos_token_ids, tokenizer)
        prompts = Prompts.of(input_ids, attention_mask, pad, eos_token_ids)
        if len(prompts) > 1 and self.streamer is not None:
            raise GraftError("a streamer follows one prompt: leave it out of a batch, or pass prompts one by one")
        of_model = model.generation_config
        stops = self.stop_strings or self.stopping_criteria or of_model.stop_strings or of_model.max_time
        if len(prompts) > 1 and pad is None and stops:
            raise GraftError(NO_PAD_TOKEN)
        return prompts

    def _pad(self, model: Any, eos_token_ids: Set[int], tokenizer: Any | None) -> int | None:
        """Raises GraftError for one of the caller's that is no token; models write -1 where they have none."""
        if self.pad_token_id is not None and not self.prepared:
            count = max(model.config.get_text_config().vocab_size, 0 if tokenizer is None else len(tokenizer))
            if not 0 <= self.pad_token_id < count:
                raise GraftError(f"pad_token_id={self.pad_token_id}: pass a token of the target, 0 to {count - 1}")
        if self.pad_token_id is not None:
            return self.pad_token_id
        known = (getattr(tokenizer, "pad_token_id", None), model.generation_config.pad_token_id)
        return next((one for one in (*known, *sorted(eos_token_ids)) if one is not None and one >= 0), None)

    def rows(self, prompts: Prompts, target: Target, eos_token_ids: Set[int], tokenizer: Any | None) -> list["Row"]:
        """Prepares each prompt before anything is computed.

        Raises:
            GraftError: a token id outside the vocabulary, too many tokens, or a setting that does not work.
        """
        rows, known_by = [], self.tokenizer or tokenizer
        for index, (prompt_S, padded_S) in enumerate(zip(prompts.prompts, prompts.padded_BS, strict=True)):
            own = self._of_prompt(index) if len(prompts) > 1 else self
            seen_S = padded_S if self.prepared else prompt_S
            check_vocabulary(seen_S, target.config.vocab_size, known_by, index)
            seen_S = seen_S.to(target.device)
            if not self.prepared:
                own = own._of_model(seen_S, target.model, eos_token_ids, known_by)
            rows.append(own._row(prompt_S.to(target.device), seen_S, target.max_positions))
        return rows

    def _of_prompt(self, index: int) -> Self:
        try:
            processors = [one if type(one) in CONTEXT_FREE else deepcopy(one) for one in self.logits_processor]
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise GraftError(
                f"each prompt of a batch needs logits processors of its own, but one cannot be copied ({error}): "
                "pass prompts one by one"
            ) from error
        return replace(self, seed=None if self.seed is None else self.seed + index, logits_processor=processors)

    def _of_model(self, prompt_S: Tensor, model: Any, eos_token_ids: Set[int], tokenizer: Any | None) -> Self:
        """Prepared by transformers: what this request leaves open comes from the model's generation_config."""
        asked: dict[str, Any] = {
            "inputs": prompt_S[None],
            "attention_mask": torch.ones_like(prompt_S)[None],
            "do_sample": bool(self.temperature),
            "eos_token_id": sorted(eos_token_ids) or None,
            "return_dict_in_generate": False,  # what comes back is the engine's own
            "logits_processor": self.logits_processor,
            **self._length(len(prompt_S), model.generation_config),
        }
        named = ["min_new_tokens", "repetition_penalty", "stop_strings"]
        if self.temperature:
            asked["temperature"] = float(self.temperature)
            asked["top_k"] = model.generation_config.top_k or 0  # or transformers would keep 50
            named += ["top_k", "top_p", "min_p"]
        asked |= {name: value for name in named if (value := getattr(self, name)) is not None}
        found = prepare(model, asked, tokenizer=tokenizer, stopping_criteria=self.stopping_criteria)
        if len(found.input_ids) > 1:
            raise GraftError(
                f"num_return_sequences={len(found.input_ids)} is not supported by an engine: pass the prompt so many "
                f"times. {FROM_MODEL}"
            )
        return replace(self, logits_processor=found.processors, stopping_criteria=found.criteria, prepared=True)

    def _length(self, prompt_length: int, of_model: Any) -> dict[str, int | None]:
        """As settings of transformers. Raises GraftError where there is no room for a token."""
        if self.max_length is not None and self.max_length <= prompt_length:
            raise GraftError(f"max_length={self.max_length} leaves no room after {prompt_length} prompt tokens")
        if self.max_length is not None:
            return {"max_length": self.max_length, "max_new_tokens": None}
        if self.max_new_tokens is None and (of_model.max_new_tokens or of_model.max_length):
            return {}
        # A length and not a count, or transformers warns where the generation_config has a length.
        return {"max_length": prompt_length + (self.max_new_tokens or DEFAULT_NEW_TOKENS), "max_new_tokens": None}

    def _row(self, prompt_S: Tensor, seen_S: Tensor, limit: int) -> "Row":
        """Of a prepared request. Raises GraftError for more positions than the target has."""
        criteria = list(self.stopping_criteria)
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        ends = {end for one in criteria if type(one) is EosTokenCriteria for end in one.eos_token_id.tolist()}
        # What says no more than a length or a token needs no tensor to be asked.
        others = StoppingCriteriaList(one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria))
        count = max(1, min(lengths) - len(seen_S))  # criteria are asked after the first token
        if len(seen_S) + count > limit:
            raise GraftError(
                f"a prompt of {len(seen_S)} tokens and max_new_tokens={count} exceed the target's "
                f"limit of {limit} positions: shorten the prompt or ask for fewer tokens"
            )
        seed = torch.Generator().seed() if self.seed is None else int(self.seed)
        processors = LogitsProcessorList(self.logits_processor)
        sampler = Sampler(processors, self.temperature == 0, seed, ends, len(seen_S) + count)
        return Row(prompt_S, seen_S, count, sampler, Stopper(seen_S, count, ends, others))


def _number(name: str, value: Any) -> int | float:
    with suppress(TypeError, RuntimeError, OverflowError):  # a tensor may hold another number, or none
        is_one = not getattr(value, "shape", ())  # torch reads [3] as 3
        if is_one and isinstance(value, SupportsIndex) and name in WHOLE:
            return as_index(value)
        if is_one and isinstance(value, SupportsFloat | SupportsIndex) and name in NUMBERS:
            return float(value)
    raise GraftError(f"{name}={value!r}: pass a {'whole ' * (name in WHOLE)}number")


def _callables(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise GraftError(f"{name}={value!r}: pass a list")
    listed = tuple(value)
    for one in listed:
        if not callable(one):
            raise GraftError(f"{name} has {one!r}, which cannot be called")
    return listed


def _is_callable(value: Any, name: str) -> bool:
    return callable(getattr(value, name, None))


def ends_of(of_model: int | Sequence[int] | None, tokenizer: Any | None) -> set[int]:
    """The tokens that end a sequence: those of the model's generation_config, and the tokenizer's, if there is one."""
    ends: list[int | None] = [of_model] if isinstance(of_model, int | None) else list(of_model)
    ends.append(getattr(tokenizer, "eos_token_id", None))
    return {end for end in ends if end is not None}


@dataclass
class Row:
    """One prompt of a generation, and what it asks.

    Attributes:
        seen_S: what logits processors and stopping criteria take for the prompt.
        new_tokens: most tokens to emit.
        is_last: called with every emitted token; returns whether it was the last.
    """

    prompt_S: Tensor
    seen_S: Tensor
    new_tokens: int
    sampler: Sampler
    is_last: "Stopper"


class Stopper:
    """Called with every emitted token in turn; returns whether it was the last.

    Args:
        prompt_S: the prompt, on the device where the criteria want the sequence.
        new_tokens: most tokens to emit.
    """

    def __init__(
        self, prompt_S: Tensor, new_tokens: int, eos_token_ids: Set[int], criteria: StoppingCriteriaList
    ) -> None:
        self.remaining = new_tokens
        self.eos_token_ids = eos_token_ids
        self.criteria = criteria
        self.length = len(prompt_S)
        if criteria:
            self.sequence_1S = torch.cat((prompt_S, prompt_S.new_zeros(new_tokens)))[None]

    def __call__(self, token: int) -> bool:
        self.remaining -= 1
        stops = self.remaining == 0 or token in self.eos_token_ids
        if self.criteria:
            self.sequence_1S[0, self.length] = token
            self.length += 1
            stops = bool(self.criteria(self.sequence_1S[:, : self.length], None).all()) or stops
        return stops
