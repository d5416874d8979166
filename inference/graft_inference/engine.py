"""The decode loop: draft, prune, graft, verify, commit, update."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .bundle import Bundle, load_bundle, load_target_model
from .device import warn_if_elsewhere
from .draft_head import DraftHead
from .drafting import Drafter
from .echo import Echo
from .errors import GraftError
from .grafting import Grafter
from .kv_cache import TreeCache
from .ngrams import NgramSource, NgramTable, RequestNgrams
from .packed_linear import pack_linears
from .policy import Plan, Policy, Stage
from .prefix import KeptPrefix
from .request import Request
from .retrieval import SuccessorMatrix
from .sampling import Sampler
from .self_check import self_check
from .state import DecodeState
from .stats import Generation, GenerationStats, PhaseClock
from .target import Target, TargetOutput
from .tree import DraftTree, Source, root_tree
from .verification import Acceptance, accept

SCOPES = ("request", "engine", "frozen")


class GraftEngine:
    """Lossless hybrid tree speculation on one target.

    Several requests may be under way at once, streams or threads: their rounds take turns.

    Args:
        target: the model, with taps where `head` wants them.
        policy: a plan per method.
        successors: the matrix that requests start from.
        eos_token_ids: generation ends after one of these.
        tokenizer: the target's, to find stop strings with.
        retrieval_scope: what the matrix learns from a request lasts for that "request" alone, or stays in the
            "engine"; "frozen" teaches it nothing. The longer contexts of a request's own text are known to
            itself in any case, and to others where they stay in the "engine".
        prefill_chunk: tokens of a prompt that are read in one pass; fewer need less memory.
        keep_prefix: keep the caches of the last finished request, so that the next turn of its chat reads only
            what is new. Output is the same; memory stays taken.
        ngrams: the corpus's longer contexts, for plans that use them.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        head: DraftHead,
        successors: SuccessorMatrix,
        eos_token_ids: Sequence[int] = (),
        tokenizer: Any | None = None,
        retrieval_scope: str = "request",
        prefill_chunk: int = 1024,
        keep_prefix: bool = False,
        ngrams: NgramTable | None = None,
    ) -> None:
        if retrieval_scope not in SCOPES:
            raise GraftError(f"unknown retrieval_scope {retrieval_scope!r}: choose one of {', '.join(SCOPES)}")
        if prefill_chunk < 1:
            raise GraftError(f"prefill_chunk={prefill_chunk}: a prompt is read at least one token at a time")
        self.target = target
        self.policy = policy
        self.head = head
        self.successors = successors
        self.ngrams = ngrams
        self.eos_token_ids = frozenset(eos_token_ids)
        self.tokenizer = tokenizer
        self.retrieval_scope = retrieval_scope
        self.prefill_chunk = prefill_chunk
        self.keep_prefix = keep_prefix
        self._kept: KeptPrefix | None = None
        self._contexts: RequestNgrams | None = None
        self._grafters: dict[Plan, Grafter] = {}
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        target: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        packed: bool = True,
        check: bool = True,
        device_map: str | dict[str, Any] | None = None,
        **settings: Any,
    ) -> Self:
        """Loads a bundle, or a bare EAGLE-3 head, and its target, each a local directory or a Hub id.

        Args:
            packed: replace linear layers by prepacked ones where that is faster (CPU only).
            check: compare a small tree pass with the target's own linear passes (`self_check`).
            device_map: spreads the target over devices, as transformers does; instead of `device`.
            settings: `retrieval_scope`, `prefill_chunk`, `keep_prefix`.

        Raises:
            GraftError: a missing or corrupt file, a target the bundle was not made for, or one whose family
                cannot be served.
        """
        model, tokenizer = load_target_model(target, device, dtype, device_map)
        if tokenizer is None:
            warnings.warn(
                f"{target} has no tokenizer: pass token ids; whether it is the one that the bundle was made with "
                "is not checked",
                stacklevel=2,
            )
        loaded = load_bundle(bundle, model.config.get_text_config(), tokenizer)
        return cls.from_bundle(loaded, model, packed, check, tokenizer=tokenizer, **settings)

    @classmethod
    def from_bundle(cls, bundle: Bundle, model: Any, packed: bool = True, check: bool = True, **settings: Any) -> Self:
        """An engine on a model already in memory. Packing changes the model's linear layers for good.

        Args:
            settings: those of the constructor, from `tokenizer` on.
        """
        target = Target(model, bundle.head.config.tapped_layers)
        if check:
            self_check(target)
        head = bundle.head.to(device=target.device, dtype=model.dtype).eval().requires_grad_(False)
        if head.embed_tokens is not None and torch.equal(head.embed_tokens.weight, target.embedding_weight):
            head.embed_tokens = None  # a copy of the target's
        if packed and not target.is_split:
            pack_linears(model)
            pack_linears(head)
        eos = model.generation_config.eos_token_id
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        warn_if_elsewhere(bundle.policy, target.device)
        ngrams = bundle.ngrams and bundle.ngrams.to(target.device)
        matrix = bundle.successors.to(target.device)
        return cls(target, bundle.policy, head, matrix, eos_ids, ngrams=ngrams, **settings)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        method: str = "graft",
        seed: int | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> Generation:
        """Continues one prompt.

        Args:
            input_ids: [prompt] or [1, prompt] int64.
            max_new_tokens, temperature, method, seed, plan, options: the attributes of `Request`.

        Raises:
            GraftError: an empty or overlong prompt, a bad argument, or no memory for the caches.
        """
        request = Request(max_new_tokens, temperature, method, seed, plan, **options)
        stats = GenerationStats()
        prompt = _prompt(input_ids)
        logprobs: list[Tensor] | None = [] if request.return_logprobs else None
        tokens = list(self._decode(prompt, request, stats, logprobs))
        new = torch.tensor([tokens], dtype=torch.long, device=input_ids.device)
        sequences = torch.cat((prompt[None].to(input_ids.device), new), dim=1)
        return Generation(sequences, stats, torch.cat(logprobs)[: len(tokens)] if logprobs else None)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        method: str = "graft",
        seed: int | None = None,
        stats: GenerationStats | None = None,
        **options: Any,
    ) -> Iterator[int]:
        """Yields token ids as they are accepted. Arguments as `generate`; `stats` is filled meanwhile."""
        request = Request(max_new_tokens, temperature, method, seed, **options)
        yield from self._decode(_prompt(input_ids), request, stats if stats is not None else GenerationStats())

    def _decode(
        self, prompt_S: Tensor, request: Request, stats: GenerationStats, logprobs: list[Tensor] | None = None
    ) -> Iterator[int]:
        plan = request.plan or self.policy.plan(request.method)
        new_tokens = request.new_tokens(len(prompt_S), self.target.max_positions)
        self._check(prompt_S, plan)
        if request.temperature and request.seed is None and self.target.is_parallel:
            raise GraftError("the processes of a tensor-parallel target must draw the same: pass seed=")
        sampler = request.sampler(len(prompt_S), self.eos_token_ids, self.target.device)
        is_last = request.stopper(prompt_S, new_tokens, self.eos_token_ids, self.tokenizer)
        if request.streamer is not None:
            request.streamer.put(prompt_S[None].cpu())
        # Not a decorator: inference mode must not leak to the caller between two tokens.
        with self._lock, torch.inference_mode():
            state, first = self._prefill(prompt_S, new_tokens, sampler, plan, stats, logprobs)
        tokens, sources = [first], ["prefill"]
        done = False
        while not done:
            for token, source in zip(tokens, sources, strict=True):
                stats.emitted += 1
                if source != "prefill":
                    stats.accepted[source] += 1
                done = is_last(token)
                if request.streamer is not None:
                    request.streamer.put(torch.tensor([token]))
                yield token
                if done:
                    break
            else:
                with self._lock, torch.inference_mode():
                    tokens, sources = self._round(state)
        if request.streamer is not None:
            request.streamer.end()
        if self.keep_prefix:
            self._keep(prompt_S, state)

    def _check(self, prompt_S: Tensor, plan: Plan) -> None:
        if int(prompt_S.min()) < 0 or int(prompt_S.max()) >= self.target.config.vocab_size:
            raise GraftError(f"the prompt has token ids outside the vocabulary of {self.target.config.vocab_size}")
        if plan.looks_up and plan.max_rank >= self.successors.ids_VK.shape[1]:
            raise GraftError(
                f"the plan's templates use successor rank {plan.max_rank}, but the matrix keeps "
                f"{self.successors.ids_VK.shape[1]} successors: calibrate again with this corpus"
            )
        if plan.looks_up and plan.scale and self.successors.probs_VK is None:
            raise GraftError("the plan scores retrieved nodes, but the matrix keeps no probabilities: build it again")
        if plan.ngrams and (self.ngrams is None or self.successors.probs_VK is None):
            raise GraftError(
                "the plan follows longer contexts, but the engine has no n-gram table or its matrix no probabilities: "
                "build the corpus with corpus.ngrams=true"
            )

    def _prefill(
        self,
        prompt_S: Tensor,
        new_tokens: int,
        sampler: Sampler,
        plan: Plan,
        stats: GenerationStats,
        logprobs: list[Tensor] | None = None,
    ) -> tuple[DecodeState, int]:
        """Reads the prompt piece by piece and emits the first token."""
        clock = PhaseClock(stats.seconds, self.target.device)
        prompt_S = prompt_S.to(self.target.device)
        cache, drafter, successors = self._caches(prompt_S, new_tokens, plan, stats)
        ngrams = self._ngrams(plan, successors)
        # As many as the cache: the last round may go beyond the request's end.
        capacity = len(prompt_S) + new_tokens + max(stage.rows for stage in plan.stages)
        echo = Echo(capacity, self.target.device) if plan.echoes else None
        texts: list[NgramSource | Echo] = [source for source in (ngrams, echo) if source is not None]
        for source in texts:
            source.read(prompt_S)
        learns = successors is not None and self.retrieval_scope != "frozen"
        for start in range(stats.reused, len(prompt_S), self.prefill_chunk):
            piece_S = prompt_S[start : start + self.prefill_chunk]
            output = self.target.prefill(piece_S, cache, all_logits=learns)
            if successors is not None and learns:
                successors.update(piece_S, output.logits_NV)
            if drafter is not None and cache.length < len(prompt_S):
                drafter.read(prompt_S[start + 1 : cache.length + 1], output.taps_NE)
        tree = root_tree(prompt_S[-1:])
        root_1, logp_1 = sampler.draw(tree, output.logits_NV[-1:], 0, 0, prompt_S, logprobs is not None)
        if logprobs is not None and logp_1 is not None:
            logprobs.append(logp_1)
        for source in texts:
            source.read(root_1)
        first = int(root_1)
        state = DecodeState(
            plan=plan,
            grafter=self._grafter(plan),
            cache=cache,
            drafter=drafter,
            successors=successors,
            ngrams=ngrams,
            echo=echo,
            learns=learns,
            sampler=sampler,
            place=1,
            root_1=root_1,
            fresh_tokens_A=torch.cat((prompt_S[start + 1 :], root_1)),
            fresh_taps_AE=output.taps_NE,
            history_S=torch.cat((prompt_S, root_1)) if sampler.needs_history else None,
            tokens=[first],
            logprobs=logprobs,
            stats=stats,
            clock=clock,
        )
        clock.mark("prefill")
        return state, first

    def _ngrams(self, plan: Plan, successors: SuccessorMatrix | None) -> NgramSource | None:
        """This request's source of longer contexts, not yet told any text."""
        if not plan.ngrams or self.ngrams is None or successors is None:
            return None
        if self.retrieval_scope == "engine" and self._contexts is None:
            self._contexts = RequestNgrams(self.target.device)
        return NgramSource(self.ngrams, successors, self._contexts)

    def _caches(
        self, prompt_S: Tensor, new_tokens: int, plan: Plan, stats: GenerationStats
    ) -> tuple[TreeCache, Drafter | None, SuccessorMatrix | None]:
        """Those of this request, holding what the last one left of the same text."""
        committed = len(prompt_S) + new_tokens
        rows = committed + max(stage.rows for stage in plan.stages)
        head_rows = committed + plan.beam_width * plan.max_passes
        successors = None
        if plan.looks_up:
            successors = self.successors.clone() if self.retrieval_scope == "request" else self.successors
        kept, self._kept = self._kept, None
        stats.reused = kept.shared(prompt_S, plan.drafts) if kept else 0
        if kept is None or not stats.reused:
            drafter = Drafter(self.head, self.target, plan.beam_width, head_rows) if plan.drafts else None
            return self.target.new_cache(rows), drafter, successors
        if self.retrieval_scope == "request" and plan.looks_up and kept.successors and kept.continues(prompt_S):
            successors = kept.successors
        return *kept.resume(stats.reused, plan, rows, head_rows), successors

    def _keep(self, prompt_S: Tensor, state: DecodeState) -> None:
        """Leaves a finished request's caches to the next one. The last token emitted is not in them."""
        device = self.target.device
        tokens_S = torch.cat((prompt_S.to(device), torch.tensor(state.tokens[:-1], dtype=torch.long, device=device)))
        with self._lock:
            self._kept = KeptPrefix(tokens_S, len(prompt_S), state.cache, state.drafter, state.successors)

    def _round(self, state: DecodeState) -> tuple[list[int], list[str]]:
        """One target pass: the tokens it emits and where each came from."""
        clock = state.clock
        clock.start()
        stage, drafted = self._draft(state)
        clock.mark("draft")
        tree = self._graft(state, stage, drafted)
        max_depth = state.grafter.depths[stage.passes]
        ancestors_NN = tree.ancestors(max_depth)
        clock.mark("graft")
        output = self.target.verify(tree, ancestors_NN, state.cache)
        clock.mark("verify")
        drawn_N, logp_N = state.sampler.draw(
            tree, output.logits_NV, state.place, max_depth, state.history_S, state.logprobs is not None
        )
        acceptance = accept(tree, ancestors_NN, drawn_N, max_depth)
        emitted = self._commit(state, tree, output, acceptance, logp_N)
        state.stats.rounds += 1
        state.stats.stages[stage.name] += 1
        clock.mark("commit")
        return emitted

    def _draft(self, state: DecodeState) -> tuple[Stage, DraftTree]:
        """Drafts from checkpoint to checkpoint until the head is unsure; the passes after that never run."""
        stages = state.plan.stages
        state.retrieved = None
        if state.drafter is None:
            return stages[0], root_tree(state.root_1)
        if stages[0].passes == 0:
            state.retrieved = self._retrieve(state, stages[0])
            if state.grafter.skips_drafting(stages[0], state.retrieved):
                state.drafter.defer(state.fresh_tokens_A, state.fresh_taps_AE)
                return stages[0], root_tree(state.root_1)
            stages = stages[1:]
        draft = state.drafter.begin(state.fresh_tokens_A, state.fresh_taps_AE)
        for stage in stages:
            while draft.passes < stage.passes:
                draft = state.drafter.deepen(draft)
            if stage is stages[-1] or bool(draft.confidence <= stage.threshold):
                break
        return stage, draft.candidates

    def _retrieve(self, state: DecodeState, stage: Stage) -> list[DraftTree]:
        return state.grafter.retrieve(stage, state.ngrams or state.successors, state.root_1, state.echo)

    def _graft(self, state: DecodeState, stage: Stage, drafted: DraftTree) -> DraftTree:
        """The best nodes of both sources."""
        if state.retrieved is None:
            state.retrieved = self._retrieve(state, stage)
        return state.grafter.tree(stage, drafted, state.retrieved)

    def _commit(
        self, state: DecodeState, tree: DraftTree, output: TargetOutput, acceptance: Acceptance, logp_N: Tensor | None
    ) -> tuple[list[int], list[str]]:
        """Keeps the accepted branch and teaches the matrix; the round's one host read is here."""
        record = torch.cat((acceptance.count[None], acceptance.emitted_D, tree.sources_N[acceptance.path_D])).tolist()
        depths = len(acceptance.path_D)
        count, tokens, sources = record[0], record[1 : 1 + depths], record[1 + depths :]
        path_A = acceptance.path_D[:count]
        state.cache.commit_branch(path_A)
        if state.successors is not None and state.learns:
            if state.plan.learns_accepted:
                state.successors.update(tree.tokens_N[path_A], output.logits_NV[path_A])
            else:
                _learn(state.successors, tree, output.logits_NV, acceptance)
        state.fresh_tokens_A = acceptance.emitted_D[:count]
        state.root_1 = state.fresh_tokens_A[-1:]
        if state.ngrams is not None:
            state.ngrams.read(state.fresh_tokens_A)
        if state.echo is not None:
            state.echo.read(state.fresh_tokens_A)
        state.fresh_taps_AE = output.taps_NE[path_A]
        state.place += count
        state.tokens += tokens[:count]
        if state.history_S is not None:
            state.history_S = torch.cat((state.history_S, state.fresh_tokens_A))
        if state.logprobs is not None and logp_N is not None:
            state.logprobs.append(logp_N[path_A])
        # Emitted token i is the node at depth i + 1; the last one is nobody's proposal.
        names = [Source(source).name.lower() for source in sources[1:count]] + ["bonus"]
        return tokens[:count], names

    def _grafter(self, plan: Plan) -> Grafter:
        if plan not in self._grafters:
            self._grafters[plan] = Grafter(plan, self.target.device)
        return self._grafters[plan]


def _learn(successors: SuccessorMatrix, tree: DraftTree, logits_NV: Tensor, acceptance: Acceptance) -> None:
    """Every verified node updates the matrix; accepted nodes win conflicts, then those earlier in the tree.

    Empty rows pose as the root, which outranks them.
    """
    row_N = torch.arange(len(tree), device=logits_NV.device)
    empty_N = tree.sources_N == Source.EMPTY
    rank_N = acceptance.accepted_N * 2 * len(tree) - row_N - empty_N * 2 * len(tree)
    order_N = rank_N.argsort()
    tokens_N = torch.where(empty_N, tree.tokens_N[0], tree.tokens_N)
    successors.update(tokens_N[order_N], logits_NV[order_N])


def _prompt(input_ids: Tensor) -> Tensor:
    prompt = input_ids[0] if input_ids.dim() == 2 and len(input_ids) == 1 else input_ids
    if prompt.dim() != 1 or len(prompt) == 0:
        raise GraftError(
            f"input_ids of shape {list(input_ids.shape)}: pass one non-empty prompt, [length] or [1, length]"
        )
    return prompt
