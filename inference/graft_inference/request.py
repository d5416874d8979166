"""What a caller asks of one generation."""

from collections.abc import Iterable, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from .errors import GraftError
from .policy import Plan
from .prompts import NO_PAD_TOKEN, Prompts
from .sampling import CONTEXT_FREE, Sampler
from .target import Target

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Request:
    """One generation's settings; they mean what they mean in transformers' `generate`.

    A batch gives each prompt what it would get alone: lengths are counted without padding, logits processors (of
    which each prompt has a copy of its own) and stopping criteria are asked prompt by prompt, [1, length].

    Attributes:
        max_new_tokens: 128 unless `max_length` is given.
        temperature: 0 is greedy.
        method: one of `policy.METHODS`.
        seed: of the sampling; the same seed gives the same text, whatever the method. None: another each time.
            Prompt i of a batch, counted from 0, has the seed `seed + i`.
        plan: used instead of the method's own.
        max_length: tokens of prompt and continuation, instead of max_new_tokens.
        min_new_tokens: no end-of-sequence token before that many.
        top_k, top_p, min_p: keep the likeliest tokens when sampling; None for all.
        repetition_penalty: divides the scores of tokens that are there already.
        logits_processor: more of them, each called with every prefix of the output, as `generate` does.
        stop_strings: generation ends with the token that completes one of them. Needs a tokenizer.
        tokenizer: for stop_strings; the engine's own if it was loaded with one.
        stopping_criteria: asked after every token.
        streamer: gets the prompt, then every token as it is accepted.
        return_logprobs: whether `Generation.logprobs` is wanted.
        pad_token_id: fills up the shorter sequences of a batch; else the tokenizer's, the model's, or the end of
            sequence.
        padding_counts: lengths include the padding of a prompt, and processors and criteria see it, as in
            transformers' `generate`.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    method: str = "graft"
    seed: int | None = None
    plan: Plan | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
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
    padding_counts: bool = False

    def prompts(
        self,
        input_ids: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None,
        model: Any,
        eos_token_ids: Set[int],
        tokenizer: Any | None,
    ) -> Prompts:
        """The prompts, and what pads them.

        Raises:
            GraftError: what `Prompts.of` raises, or a batch with a streamer.
        """
        known = (self.pad_token_id, getattr(tokenizer, "pad_token_id", None), model.generation_config.pad_token_id)
        pad = next((one for one in (*known, *sorted(eos_token_ids)) if one is not None), None)
        prompts = Prompts.of(input_ids, attention_mask, pad, eos_token_ids)
        if len(prompts) > 1 and self.streamer is not None:
            raise GraftError("a streamer follows one prompt: leave it out of a batch, or pass prompts one by one")
        if len(prompts) > 1 and pad is None and (self.stop_strings or self.stopping_criteria):
            raise GraftError(NO_PAD_TOKEN)
        return prompts

    def rows(self, prompts: Prompts, target: Target, eos_token_ids: Set[int], tokenizer: Any | None) -> list["Row"]:
        """What each prompt asks, before any pass.

        Raises:
            GraftError: a token id outside the vocabulary, too many tokens, or a setting that does not work.
        """
        rows = []
        for index, (prompt_S, padded_S) in enumerate(zip(prompts.prompts, prompts.padded_BS, strict=True)):
            if int(prompt_S.min()) < 0 or int(prompt_S.max()) >= target.config.vocab_size:
                raise GraftError(f"the prompt has token ids outside the vocabulary of {target.config.vocab_size}")
            own = self._of_prompt(index) if len(prompts) > 1 else self
            seen_S = padded_S if self.padding_counts else prompt_S
            new_tokens = own.new_tokens(len(seen_S), target.max_positions)
            sampler = own.sampler(len(seen_S), new_tokens, eos_token_ids, target.device)
            stopper = own.stopper(seen_S, new_tokens, eos_token_ids, tokenizer)
            rows.append(Row(prompt_S.to(target.device), seen_S.to(target.device), new_tokens, sampler, stopper))
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

    def new_tokens(self, prompt_length: int, limit: int) -> int:
        """Most tokens to emit.

        Raises:
            GraftError: none, or more positions than the target has.
        """
        if self.max_new_tokens is not None and self.max_length is not None:
            raise GraftError("max_new_tokens and max_length are two ways to say one thing: pass one of them")
        count = DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        if self.max_length is not None:
            count = self.max_length - prompt_length
            if count < 1:
                raise GraftError(f"max_length={self.max_length} leaves no room after {prompt_length} prompt tokens")
        if count < 1:
            raise GraftError(f"max_new_tokens={count}: ask for at least 1")
        if prompt_length + count > limit:
            raise GraftError(
                f"a prompt of {prompt_length} tokens and max_new_tokens={count} exceed the target's "
                f"limit of {limit} positions: shorten the prompt or ask for fewer tokens"
            )
        return count

    def sampler(self, prompt_length: int, new_tokens: int, eos_token_ids: Set[int], device: torch.device) -> Sampler:
        """Raises GraftError for a setting out of its range."""
        if self.temperature < 0:
            raise GraftError(f"temperature={self.temperature}: 0 is greedy, more samples")
        processors = LogitsProcessorList()
        try:
            if self.repetition_penalty is not None and self.repetition_penalty != 1:
                processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
            if self.min_new_tokens and eos_token_ids:
                ends = sorted(eos_token_ids)
                processors.append(
                    MinNewTokensLengthLogitsProcessor(prompt_length, self.min_new_tokens, ends, str(device))
                )
            processors.extend(self.logits_processor)
            if self.temperature:
                if self.temperature != 1:
                    processors.append(TemperatureLogitsWarper(float(self.temperature)))
                if self.top_k:
                    processors.append(TopKLogitsWarper(self.top_k))
                if self.top_p is not None and self.top_p < 1:
                    processors.append(TopPLogitsWarper(self.top_p))
                if self.min_p is not None:
                    processors.append(MinPLogitsWarper(self.min_p))
        except (ValueError, TypeError) as error:
            raise GraftError(f"bad sampling setting: {error}") from error
        seed = torch.Generator().seed() if self.seed is None else int(self.seed)
        end_ids = set(eos_token_ids).union(
            *(one.eos_token_id.tolist() for one in self.stopping_criteria if isinstance(one, EosTokenCriteria))
        )
        return Sampler(processors, self.temperature == 0, seed, end_ids, prompt_length + new_tokens)

    def stopper(self, prompt_S: Tensor, new_tokens: int, eos_token_ids: Set[int], tokenizer: Any | None) -> "Stopper":
        """Raises GraftError if a stop string has no tokenizer to be found with."""
        criteria = StoppingCriteriaList(self.stopping_criteria)
        if self.stop_strings:
            tokenizer = self.tokenizer or tokenizer
            if tokenizer is None:
                raise GraftError("stop_strings need a tokenizer: pass tokenizer=")
            strings = [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings)
            criteria.append(StopStringCriteria(tokenizer, strings))
        return Stopper(prompt_S, new_tokens, eos_token_ids, criteria)


@dataclass
class Row:
    """One prompt of a generation, and what it asks.

    Attributes:
        seen_S: what logits processors and stopping criteria take for the prompt.
        new_tokens: most tokens to emit.
        is_last: told every emitted token.
    """

    prompt_S: Tensor
    seen_S: Tensor
    new_tokens: int
    sampler: Sampler
    is_last: "Stopper"


class Stopper:
    """Told every emitted token in turn; says whether it was the last.

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
