"""The engine: requests in, tokens out; rounds of speculation between them."""

import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.streamers import BaseStreamer

from .bundle import Bundle, load_bundle, load_target_model, served_dtype
from .decode.prefix import KeptPrefix
from .decode.state import DecodeState
from .device import warn_if_elsewhere
from .errors import GraftError
from .heads.families import Head, drop_copies, most_steps, possible_copies
from .policy.plan import Plan
from .policy.policy import Policy
from .policy.tree_builder import check_sources
from .prompts import Prompts
from .refill import Finished, Running, refilled
from .request import Request, Row, ends_of
from .retrieval.successor_matrix import SuccessorMatrix
from .runner import EngineSettings, Runner
from .stats import Generation, GenerationStats
from .target.model import Target
from .target.packed_linear import pack_linears, pack_target
from .target.self_check import self_check
from .verification import Emitted


class GraftEngine(Runner):
    """Lossless hybrid tree speculation on one target.

    Several requests may be under way at once, streams or threads: their rounds take turns.

    Args:
        target: the model; its `aux_layer_ids` are those that `head` reads.
        policy: the plan of each method.
        head: the draft head; None where no plan drafts.
        successors: the successor matrix that requests start from.
        eos_token_ids: generation ends after one of these, and no other.
        tokenizer: the target's, to find stop strings with.
        settings: those of `EngineSettings`.

    Raises:
        GraftError: an unknown scope, a piece of no token, or graphs asked for without CUDA.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        head: Head | None,
        successors: SuccessorMatrix,
        eos_token_ids: Sequence[int] = (),
        tokenizer: Any | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(target, policy, head, successors, EngineSettings(**settings))
        self.eos_token_ids = frozenset(eos_token_ids)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path | None,
        target: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        packed: bool = True,
        check: bool = True,
        device_map: str | dict[str, Any] | None = None,
        tp_plan: str | None = None,
        **settings: Any,
    ) -> Self:
        """Loads a bundle, or a bare head, and its target, each a local directory or a Hub id.

        Args:
            bundle: None where there is no head yet: prompt lookup alone speculates then.
            device: "auto" is CUDA where there is one, else the CPU.
            dtype: "auto" is bfloat16 on CUDA. On a CPU it is the one in which the policy was measured on a CPU, else
                float32.
            packed: replace linear layers by prepacked ones where that is faster (CPU only).
            check: compare a small tree pass with the target's own linear passes (`self_check`).
            device_map: spreads the target over devices, as transformers does; instead of `device`.
            tp_plan: "auto" shares the target out over the processes that torchrun started; all of them must ask the
                same of their engines.
            settings: those of `EngineSettings`.

        Raises:
            GraftError: a missing or corrupt file, a target the bundle was not made for, or one whose family
                cannot be served.
        """
        EngineSettings(**settings)  # a bad one is told before anything is loaded
        dtype = served_dtype(bundle, device, dtype)
        model, tokenizer = load_target_model(target, device, dtype, device_map, tp_plan)
        if tokenizer is None:
            warnings.warn(
                f"{target} has no tokenizer: pass token ids; whether it is the one that the bundle was made with "
                "is not checked",
                stacklevel=2,
            )
        loaded = load_bundle(bundle, model.config.get_text_config(), tokenizer)
        return cls.from_bundle(loaded, model, packed, check, tokenizer, **settings)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        model: Any,
        packed: bool = True,
        check: bool = True,
        tokenizer: Any | None = None,
        **settings: Any,
    ) -> Self:
        """An engine on a model already in memory. Packing changes the model's linear layers for good.

        Args:
            tokenizer: the target's. Its end of sequence ends a generation beside those of the model's
                generation_config: that of a chat model may lack the token that ends a turn.
            settings: those of `EngineSettings`.

        Raises:
            GraftError: a family that cannot be served, another engine's model, a bad setting. The model is untouched.
        """
        head = bundle.head
        target = Target(model, () if head is None else head.config.aux_layer_ids)
        with target.released_on_failure():
            if check:
                self_check(target)
            if head is not None:
                head.to(device=target.device, dtype=model.dtype).eval().requires_grad_(False)
                if possible_copies(head):
                    drop_copies(head, target.embedding_weight, model.get_output_embeddings().weight)
            warn_if_elsewhere(bundle.policy, target.device)
            matrix = bundle.successors.to(target.device)
            ends = sorted(ends_of(model.generation_config.eos_token_id, tokenizer))
            engine = cls(target, bundle.policy, head, matrix, ends, tokenizer, **settings)
            if packed and not target.is_split:
                pack_target(target)
                if head is not None:
                    pack_linears(head)
            return engine

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        method: str = "graft",
        seed: int | None = None,
        plan: Plan | None = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> Generation:
        """Continues one prompt, or a batch of prompts at the same time.

        Each prompt of a batch has its own trees, and ends for itself; one pass of the target serves all of them.
        Kept prefixes are neither used nor replaced by a batch.

        Args:
            input_ids: [prompt] or [1, prompt] integers; a batch as [B, prompt] or as a list of [prompt]. Tensors,
                arrays or lists, on any device; or what a tokenizer or its chat template returns, with its mask.
            max_new_tokens: most new tokens of each prompt; None: see `Request`.
            temperature: 0 is greedy.
            method: "graft", "eagle3", "retrieve" or "autoregressive".
            seed: of the sampling; prompt i of a batch has `seed + i`. None: another each time.
            plan: used instead of the method's own.
            attention_mask: [B, prompt], 0 for padding, which stands on the left or the right of a prompt.
            options: further attributes of `Request`.

        Raises:
            GraftError: an empty or overlong prompt, a token that the target has no embedding for, a bad or unknown
                argument, or no memory for the caches.
        """
        request = Request.of(
            max_new_tokens=max_new_tokens, temperature=temperature, method=method, seed=seed, plan=plan, **options
        )
        return self.run(request, input_ids, attention_mask)

    def run(self, request: Request, input_ids: Any, attention_mask: Any = None) -> Generation:
        """`generate`, its settings in one object."""
        prompts = request.prompts(input_ids, attention_mask, self.target.model, self.eos_token_ids, self.tokenizer)
        each = [GenerationStats() for _ in prompts.prompts]
        logprobs: list[list[Tensor]] | None = [[] for _ in each] if request.return_logprobs else None
        tokens: list[list[int]] = [[] for _ in each]
        for index, token in self._decode(prompts, request, each, logprobs):
            tokens[index].append(token)
        sequences = prompts.with_new(tokens)
        if logprobs is None:
            return Generation(sequences, GenerationStats.together(each), each)
        lines = [torch.cat(parts)[: len(line)] for parts, line in zip(logprobs, tokens, strict=True)]
        found = lines[0] if len(lines) == 1 else pad_sequence(lines, batch_first=True)
        return Generation(sequences, GenerationStats.together(each), each, found)

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        method: str = "graft",
        seed: int | None = None,
        stats: GenerationStats | None = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> Generator[int, None, None]:
        """Yields token ids of one prompt as they are accepted, several after each round.

        Arguments that are not listed are those of `generate`.

        Args:
            stats: filled while tokens come; the last of its `sources` is that of the token just yielded.

        Raises:
            GraftError: what `generate` raises, and for a batch.
        """
        request = Request.of(
            max_new_tokens=max_new_tokens, temperature=temperature, method=method, seed=seed, **options
        )
        if request.return_logprobs:
            raise GraftError("return_logprobs is for generate alone, as a stream yields tokens: leave it out")
        prompts = request.prompts(input_ids, attention_mask, self.target.model, self.eos_token_ids, self.tokenizer)
        if len(prompts) > 1:
            raise GraftError(f"a batch of {len(prompts)} prompts cannot be streamed: stream them one by one")
        with closing(self._decode(prompts, request, [GenerationStats() if stats is None else stats])) as decoded:
            for _, token in decoded:
                yield token

    def run_many(
        self, requests: Iterable[tuple[Any, Request]], at_most: int, keep_aux: bool = False
    ) -> Generator[Finished, None, None]:
        """Continues any number of prompts, at most so many at a time, and yields each when it has ended.

        When a prompt ends, the next one takes its place, so that none waits for the longest. Each gets what `run` would
        give it alone. Kept prefixes are neither used nor replaced.

        Args:
            requests: a prompt and its settings each, all of one plan; read as places become free.
            at_most: most prompts under way, each with caches of its own.
            keep_aux: return the target's aux hidden states too, which takes one more pass over each last token.

        Raises:
            GraftError: what `run` raises, with the number of the prompt; nothing is yielded after it.
        """
        if at_most < 1:
            raise GraftError(f"at_most={at_most}: run at least one prompt at a time")
        plans: set[tuple[Plan, bool]] = set()

        def begin(fresh: Sequence[tuple[int, tuple[Any, Request]]]) -> list[Running]:
            plans.update((self._plan_of(one), self._falls_back(one)) for _, (_, one) in fresh)
            rows = [self._only_row(number, ids, request) for number, (ids, request) in fresh]
            if len(plans) > 1:
                raise GraftError(f"prompts {fresh[0][0]} and on ask for another plan: run_many takes prompts of one")
            return self._begin([number for number, _ in fresh], rows, fresh[0][1][1], keep_aux)

        def advance(running: Sequence[Running]) -> list[Emitted]:
            with self._lock, torch.inference_mode():
                return self._round([one.state for one in running])

        yield from refilled(requests, at_most, begin, advance)

    def _only_row(self, number: int, input_ids: Any, request: Request) -> Row:
        if request.streamer is not None or request.return_logprobs:
            raise GraftError(f"prompt {number}: run_many knows neither streamer nor return_logprobs; leave them out")
        try:
            prompts = request.prompts(input_ids, None, self.target.model, self.eos_token_ids, self.tokenizer)
            if len(prompts) > 1:
                raise GraftError(f"it is a batch of {len(prompts)}; pass its prompts one by one")
            return request.rows(prompts, self.target, self.eos_token_ids, self.tokenizer)[0]
        except GraftError as error:
            raise GraftError(f"prompt {number}: {error}") from error

    def _begin(self, numbers: Sequence[int], rows: Sequence[Row], request: Request, keep_aux: bool) -> list[Running]:
        """Reads the prompts of requests whose plan is that of this one."""
        plan = self._plan_of(request)
        with self._lock, torch.inference_mode():
            each = [GenerationStats() for _ in rows]
            states, first = self._prefill(rows, plan, each, [None] * len(rows), resumes=False, keep_aux=keep_aux)
            self._let_fall_back(states, request, plan)
        begun = [Running(*one) for one in zip(numbers, rows, states, strict=True)]
        for one, token in zip(begun, first, strict=True):
            one.take(([token], ["prefill"]))
        return begun

    def _plan_of(self, request: Request) -> Plan:
        """Raises GraftError for a plan that asks for what the engine does not have, or draws that would differ."""
        if request.temperature and request.seed is None and self.target.is_parallel:
            raise GraftError("the processes of a tensor-parallel target must draw the same: pass seed=")
        plan = request.plan or self.policy.plan(request.method)
        if self.head is None and plan.drafts:
            raise GraftError(
                "this engine has no draft head, and the plan drafts: choose another method, or load a bundle"
            )
        if self.head is None:
            check_sources(plan, 0, self.tables)
        else:
            shape = self.head.config
            check_sources(plan, shape.draft_vocab_size, self.tables, most_steps(shape))
        return plan

    def _decode(
        self,
        prompts: Prompts,
        request: Request,
        each: Sequence[GenerationStats],
        logprobs: Sequence[list[Tensor]] | None = None,
    ) -> Generator[tuple[int, int], None, None]:
        """Yields tokens as they are accepted, with the index of their prompt."""
        plan = self._plan_of(request)
        rows = request.rows(prompts, self.target, self.eos_token_ids, self.tokenizer)
        if request.streamer is not None:
            request.streamer.put(prompts.padded_BS.cpu())
        # Not a decorator: inference mode must not leak to the caller between two tokens.
        with self._lock, torch.inference_mode():
            opened, first = self._prefill(rows, plan, each, logprobs or [None] * len(rows))
            self._let_fall_back(opened, request, plan)
        with suppress(GeneratorExit):  # the caller has enough: between two tokens everything is in order
            yield from self._rounds(rows, opened, first, request.streamer)
        for state in opened:
            state.clock.settle()
        if request.streamer is not None:
            request.streamer.end()
        if self.keep_prefix and len(rows) == 1:
            with self._lock:
                self._kept = KeptPrefix.of(rows[0].prompt_S, opened[0])

    def _rounds(
        self, rows: Sequence[Row], opened: Sequence[DecodeState], first: Sequence[int], streamer: BaseStreamer | None
    ) -> Iterator[tuple[int, int]]:
        """Round after round, until every prompt has ended."""
        states = dict(enumerate(opened))
        emitted: dict[int, Emitted] = {index: ([token], ["prefill"]) for index, token in enumerate(first)}
        while states:
            for index, (tokens, sources) in emitted.items():
                for token, source in zip(tokens, sources, strict=True):
                    opened[index].stats.count(source)
                    done = rows[index].is_last(token)
                    if streamer is not None:
                        streamer.put(torch.tensor([token]))
                    yield index, token
                    if done:
                        del states[index]
                        break
            if states:
                with self._lock, torch.inference_mode():
                    emitted = dict(zip(states, self._round(list(states.values())), strict=True))
