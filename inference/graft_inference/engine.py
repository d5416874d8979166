"""The decode loop: draft, prune, graft, verify, commit, update."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .bundle import Bundle, load_bundle, load_target_model
from .device import warn_if_elsewhere
from .draft_head import DraftHead
from .drafting import Drafter
from .errors import GraftError
from .grafting import Grafter
from .kv_cache import TreeCache
from .packed_linear import pack_linears
from .policy import Plan, Policy, Stage
from .retrieval import SuccessorMatrix
from .target import Target, TargetOutput
from .tree import DraftTree, Source, root_tree
from .verification import Acceptance, accept, draw

PHASES = ("prefill", "draft", "graft", "verify", "commit")


@dataclass
class GenerationStats:
    """What one generation did.

    Attributes:
        rounds: target passes after the prefill.
        emitted: new tokens, the prefill's first one included.
        seconds: wall time by phase. `graft` is look-up and merging, `commit` acceptance, cache and matrix.
        accepted: kept tokens of the rounds by source: drafted, retrieved, and bonus (the target's own).
        stages: rounds by the stage they stopped at; "none" where no head ran.
    """

    rounds: int = 0
    emitted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    accepted: dict[str, int] = field(default_factory=lambda: {"drafted": 0, "retrieved": 0, "bonus": 0})
    stages: Counter[str] = field(default_factory=Counter)

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per target pass, bonus included, the prefill's token not; 1 for AR."""
        return (self.emitted - 1) / self.rounds if self.rounds else 1.0

    @property
    def decode_seconds(self) -> float:
        return sum(self.seconds.values()) - self.seconds["prefill"]

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the prefill and its token are not counted."""
        return (self.emitted - 1) / self.decode_seconds if self.rounds else 0.0


@dataclass
class Generation:
    """sequences: prompt and new tokens, [1, prompt + new] int64."""

    sequences: Tensor
    stats: GenerationStats


@dataclass
class DecodeState:
    """Everything that changes while one prompt is decoded.

    Attributes:
        root_1: the last emitted token, not yet in the cache.
        fresh_tokens_A, fresh_taps_AE: what the last round committed.
        retrieved: this round's retrieved candidates, once looked up.
    """

    plan: Plan
    grafter: Grafter
    cache: TreeCache
    drafter: Drafter | None
    successors: SuccessorMatrix | None
    temperature: float
    generator: torch.Generator
    root_1: Tensor
    fresh_tokens_A: Tensor
    fresh_taps_AE: Tensor
    stats: GenerationStats
    clock: "PhaseClock"
    retrieved: DraftTree | None = None


class PhaseClock:
    """Adds the time since the last mark to a phase; on a GPU it waits for the device first."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self.last
        self.last = now


class GraftEngine:
    """Lossless hybrid tree speculation on one target.

    Args:
        target: the model, with taps where `head` wants them.
        policy: a plan per method.
        successors: the matrix every request starts from; each works on its own copy.
        eos_token_ids: generation ends after one of these.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        head: DraftHead,
        successors: SuccessorMatrix,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.target = target
        self.policy = policy
        self.head = head
        self.successors = successors
        self.eos_token_ids = frozenset(eos_token_ids)
        self._grafters: dict[Plan, Grafter] = {}

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        target: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        packed: bool = True,
    ) -> Self:
        """Loads a bundle and its target, each a local directory or a Hub id.

        Args:
            packed: replace linear layers by prepacked ones where that is faster (CPU only).

        Raises:
            GraftError: a missing or corrupt file, or a target the bundle was not made for.
        """
        model, tokenizer = load_target_model(target, device, dtype)
        loaded = load_bundle(bundle, model.config.get_text_config(), tokenizer)
        return cls.from_bundle(loaded, model, packed)

    @classmethod
    def from_bundle(cls, bundle: Bundle, model: Any, packed: bool = True) -> Self:
        """An engine on a model already in memory. Packing changes the model's linear layers for good."""
        head = bundle.head.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
        if packed:
            pack_linears(model)
            pack_linears(head)
        eos = model.generation_config.eos_token_id
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        successors = bundle.successors.to(model.device)
        warn_if_elsewhere(bundle.policy, model.device)
        return cls(Target(model, head.config.tapped_layers), bundle.policy, head, successors, eos_ids)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        method: str = "graft",
        seed: int | None = None,
        plan: Plan | None = None,
    ) -> Generation:
        """Continues one prompt.

        Args:
            input_ids: [prompt] or [1, prompt] int64.
            temperature: 0 is greedy.
            method: one of `policy.METHODS`.
            seed: of the sampling; the same seed gives the same tokens.
            plan: used instead of the method's own.

        Raises:
            GraftError: an empty or overlong prompt, or a bad argument.
        """
        stats = GenerationStats()
        prompt = _prompt(input_ids)
        tokens = list(self._decode(prompt, max_new_tokens, temperature, method, seed, plan, stats))
        new = torch.tensor([tokens], dtype=torch.long, device=input_ids.device)
        return Generation(torch.cat((prompt[None].to(input_ids.device), new), dim=1), stats)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        method: str = "graft",
        seed: int | None = None,
        stats: GenerationStats | None = None,
    ) -> Iterator[int]:
        """Yields token ids as they are accepted. Arguments as `generate`; `stats` is filled meanwhile."""
        stats = stats if stats is not None else GenerationStats()
        yield from self._decode(_prompt(input_ids), max_new_tokens, temperature, method, seed, None, stats)

    def _decode(
        self,
        prompt_S: Tensor,
        max_new_tokens: int,
        temperature: float,
        method: str,
        seed: int | None,
        plan: Plan | None,
        stats: GenerationStats,
    ) -> Iterator[int]:
        plan = plan or self.policy.plan(method)
        self._check(prompt_S, max_new_tokens, temperature, plan)
        # Not a decorator: inference mode must not leak to the caller between two tokens.
        with torch.inference_mode():
            state, token = self._prefill(prompt_S, max_new_tokens, temperature, seed, plan, stats)
        stats.emitted = 1
        yield token
        while stats.emitted < max_new_tokens and token not in self.eos_token_ids:
            with torch.inference_mode():
                tokens, sources = self._round(state)
            for token, source in zip(tokens, sources, strict=True):
                stats.emitted += 1
                stats.accepted[source] += 1
                yield token
                if stats.emitted == max_new_tokens or token in self.eos_token_ids:
                    break

    def _check(self, prompt_S: Tensor, max_new_tokens: int, temperature: float, plan: Plan) -> None:
        limit = self.target.max_positions
        if max_new_tokens < 1:
            raise GraftError(f"max_new_tokens={max_new_tokens}: ask for at least 1")
        if temperature < 0:
            raise GraftError(f"temperature={temperature}: 0 is greedy, more samples")
        if len(prompt_S) + max_new_tokens > limit:
            raise GraftError(
                f"a prompt of {len(prompt_S)} tokens and max_new_tokens={max_new_tokens} exceed the target's "
                f"limit of {limit} positions: shorten the prompt or ask for fewer tokens"
            )
        if int(prompt_S.min()) < 0 or int(prompt_S.max()) >= self.target.config.vocab_size:
            raise GraftError(f"the prompt has token ids outside the vocabulary of {self.target.config.vocab_size}")
        if plan.retrieves and plan.max_rank >= self.successors.ids_VK.shape[1]:
            raise GraftError(
                f"the plan's templates use successor rank {plan.max_rank}, but the matrix keeps "
                f"{self.successors.ids_VK.shape[1]} successors: calibrate again with this corpus"
            )
        if plan.retrieves and plan.scale and self.successors.probs_VK is None:
            raise GraftError("the plan scores retrieved nodes, but the matrix keeps no probabilities: build it again")

    def _prefill(
        self,
        prompt_S: Tensor,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
        plan: Plan,
        stats: GenerationStats,
    ) -> tuple[DecodeState, int]:
        """Reads the prompt and emits the first token."""
        clock = PhaseClock(stats.seconds, self.target.device)
        prompt_S = prompt_S.to(self.target.device)
        committed = len(prompt_S) + max_new_tokens
        cache = self.target.new_cache(committed + max(stage.rows for stage in plan.stages))
        drafter = None
        if plan.drafts:
            capacity = committed + plan.beam_width * plan.max_passes
            drafter = Drafter(self.head, self.target, plan.beam_width, capacity)
        generator = torch.Generator(self.target.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        output = self.target.prefill(prompt_S, cache)
        root_1 = draw(output.logits_NV[-1:], temperature, generator)
        successors = None
        if plan.retrieves:
            successors = self.successors.clone()
            successors.update(prompt_S, output.logits_NV)
        state = DecodeState(
            plan=plan,
            grafter=self._grafter(plan),
            cache=cache,
            drafter=drafter,
            successors=successors,
            temperature=temperature,
            generator=generator,
            root_1=root_1,
            fresh_tokens_A=torch.cat((prompt_S[1:], root_1)),
            fresh_taps_AE=output.taps_NE,
            stats=stats,
            clock=clock,
        )
        token = int(root_1)
        clock.mark("prefill")
        return state, token

    def _round(self, state: DecodeState) -> tuple[list[int], list[str]]:
        """One target pass: the tokens it emits and where each came from."""
        clock = state.clock
        clock.last = clock._now()
        stage, drafted = self._draft(state)
        clock.mark("draft")
        tree = self._graft(state, stage, drafted)
        max_depth = state.grafter.depths[stage.passes]
        ancestors_NN = tree.ancestors(max_depth)
        clock.mark("graft")
        output = self.target.verify(tree, ancestors_NN, state.cache)
        clock.mark("verify")
        drawn_N = draw(output.logits_NV, state.temperature, state.generator)
        acceptance = accept(tree, ancestors_NN, drawn_N, max_depth)
        emitted = self._commit(state, tree, output, acceptance)
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
            state.retrieved = state.grafter.retrieve(stages[0], state.successors, state.root_1)
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

    def _graft(self, state: DecodeState, stage: Stage, drafted: DraftTree) -> DraftTree:
        """The best nodes of both sources."""
        if state.retrieved is None:
            state.retrieved = state.grafter.retrieve(stage, state.successors, state.root_1)
        return state.grafter.tree(stage, drafted, state.retrieved)

    def _commit(
        self, state: DecodeState, tree: DraftTree, output: TargetOutput, acceptance: Acceptance
    ) -> tuple[list[int], list[str]]:
        """Keeps the accepted branch and teaches the matrix; the round's one host read is here."""
        record = torch.cat((acceptance.count[None], acceptance.emitted_D, tree.sources_N[acceptance.path_D])).tolist()
        depths = len(acceptance.path_D)
        count, tokens, sources = record[0], record[1 : 1 + depths], record[1 + depths :]
        path_A = acceptance.path_D[:count]
        state.cache.commit_branch(path_A)
        if state.successors is not None:
            if state.plan.learns_accepted:
                state.successors.update(tree.tokens_N[path_A], output.logits_NV[path_A])
            else:
                _learn(state.successors, tree, output.logits_NV, acceptance)
        state.fresh_tokens_A = acceptance.emitted_D[:count]
        state.root_1 = state.fresh_tokens_A[-1:]
        state.fresh_taps_AE = None if output.taps_NE is None else output.taps_NE[path_A]
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
