"""What every policy would have met: one record for each position of the target's own continuations.

The matrix of a position has learned from the text before it, as in a request whose plan learns from
accepted tokens alone. All else that a round looks at depends on the text alone too. So any plan can be
replayed without the models.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from graft_inference import GraftEngine, GraftError
from graft_inference.decode.sampling import Sampler
from graft_inference.files import replace_file
from graft_inference.heads.eagle3.drafter import Drafter
from graft_inference.noise import Noise
from graft_inference.policy.plan import RankPaths, depth_template
from graft_inference.retrieval.ngrams import LONGEST, NgramSource
from graft_inference.retrieval.prompt_lookup import Echo
from graft_inference.retrieval.successor_matrix import SuccessorMatrix, Template
from graft_inference.target.model import TargetOutput
from graft_inference.tree import DraftTree, Source, merge
from graft_train.processes import is_main


@dataclass
class Traces:
    """T positions, P head passes, C drafted, R, G and E retrieved candidates (roots left out), D depths.

    Attributes:
        prompt_T: which prompt a position belongs to; positions of a prompt stand in order.
        context_T: tokens before the root.
        truth_TD: the tokens that follow the root; -1 past the end of the continuation.
        confidence_TP: the head's confidence after 1..P passes (Graft Eq. 6).
        tokens_TC, parents_TC, logp_TC: the drafted nodes of all passes; parent -1 is the root.
        depths_C: pass that proposed each.
        retrieved_TR: token of each rank path; -1 where the matrix has none.
        retrieved_logp_TR: their cumulative log-probability in the matrix.
        template_RL: the rank paths, padded with -1.
        ngrams_TG, ngrams_logp_TG, ngrams_template_GL: the same three for longer contexts (`NgramSource`); G is 0
            where the corpus has none.
        echo_TE, matched_T: what followed the longest earlier match of the text's end, and its length; 0: none.
        reach_TC, reach_TR, ngrams_reach_TG, echo_reach_TE: P(accepted) under the target, that is of all tokens on the
            path; at temperature 0, and where the noise of the draws is told, whether they are those that follow.
    """

    prompt_T: Tensor
    context_T: Tensor
    truth_TD: Tensor
    confidence_TP: Tensor
    tokens_TC: Tensor
    parents_TC: Tensor
    logp_TC: Tensor
    depths_C: Tensor
    retrieved_TR: Tensor
    retrieved_logp_TR: Tensor
    template_RL: Tensor
    reach_TC: Tensor
    reach_TR: Tensor
    ngrams_TG: Tensor
    ngrams_logp_TG: Tensor
    ngrams_template_GL: Tensor
    ngrams_reach_TG: Tensor
    echo_TE: Tensor
    matched_T: Tensor
    echo_reach_TE: Tensor

    def __len__(self) -> int:
        return len(self.prompt_T)

    @property
    def template(self) -> RankPaths:
        return tuple(tuple(rank for rank in path if rank >= 0) for path in self.template_RL.tolist())

    def of_ngrams(self) -> "Traces":
        """With the retrieved candidates of longer contexts in the place of the matrix's."""
        return replace(
            self,
            retrieved_TR=self.ngrams_TG,
            retrieved_logp_TR=self.ngrams_logp_TG,
            template_RL=self.ngrams_template_GL,
            reach_TR=self.ngrams_reach_TG,
        )

    def save(self, path: Path, made_of: dict[str, Any]) -> None:
        """Writes the traces and what they were made of: fingerprints of target, head, corpus and data, and settings."""
        tensors = {column.name: getattr(self, column.name).contiguous() for column in fields(self)}
        metadata = {"made_of": json.dumps(made_of, sort_keys=True)}
        replace_file(path, lambda aside: save_file(tensors, aside, metadata))

    @classmethod
    def load(cls, path: Path, made_of: dict[str, Any]) -> "Traces":
        """Raises GraftError for a missing or damaged file, or one made of other weights or data."""
        try:
            with safe_open(path, "pt") as file:
                recorded = json.loads((file.metadata() or {}).get("made_of", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise GraftError(f"{path} cannot be read ({error}): run graft calibrate without latency_only") from error
        for name, expected in made_of.items():
            if recorded.get(name) != expected:
                raise GraftError(
                    f"{path} was traced with another {name} ({recorded.get(name)}, now {expected}): delete "
                    f"{path.parent} and run graft calibrate without policy.latency_only"
                )
        if set(tensors) != {column.name for column in fields(cls)}:
            raise GraftError(f"{path} is not a file of traces; delete {path.parent} and run graft calibrate")
        return cls(**tensors)


@torch.inference_mode()
def record_traces(
    engine: GraftEngine,
    prompts: list[Tensor],
    max_new_tokens: int,
    topk: int,
    num_steps: int,
    retrieval_depth: int,
    paths: int,
    echo_depth: int,
    temperature: float = 0.0,
    shares_noise: bool = False,
    positions: int | None = None,
) -> Traces:
    """Traces a continuation of each prompt ([length] int64).

    Args:
        positions: once there are so many, no further prompt is traced.
        shares_noise: whether head and retrieval are told the noise of the draws, as plans say by the same name.
        paths: nodes looked up in each source at every position: the rank paths that lead to the truth most often.
        echo_depth: tokens taken from the text's own repetitions.
    """
    bar = tqdm(prompts, desc="calibrate: continuations", unit="prompt", disable=not is_main())
    texts = []
    for index, prompt in enumerate(bar):
        whole = engine.generate(prompt, max_new_tokens, temperature, "autoregressive", seed=index).sequences[0]
        sampler = Sampler.of(temperature, index)
        texts.append(Text(whole.to(engine.target.device), len(prompt), sampler if shares_noise else None))
        if positions is not None and sum(len(text.tokens_S) - text.start - 1 for text in texts) >= positions:
            break
    template = likely_paths(engine, texts, retrieval_depth, paths)
    longer = likely_paths(engine, texts, retrieval_depth, paths, ngrams=True) if engine.ngrams else []
    tracer = _Tracer(engine, topk, num_steps, template, longer, retrieval_depth, echo_depth, temperature)
    parts = []
    for index, text in enumerate(tqdm(texts, desc="calibrate: traces", unit="prompt", disable=not is_main())):
        parts.append(tracer.trace(text, index))
    if not any(parts):
        raise GraftError("the target ended every calibration prompt at once: regenerate from other data")
    names = next(part for part in parts if part)
    columns = {name: torch.cat([part[name] for part in parts if part]).cpu() for name in names}
    if columns["logp_TC"].isneginf().any():
        raise GraftError(
            f"the draft head overflows in {engine.target.model.dtype}: choose another target.dtype, or train it again"
        )
    passes_C = [1] * topk + [p for p in range(2, num_steps + 1) for _ in range(topk**2)]
    padded = [
        torch.tensor([[*path, *[-1] * (retrieval_depth - len(path))] for path in paths])
        .view(-1, retrieval_depth)
        .long()
        for paths in (template, longer)
    ]
    return Traces(**columns, depths_C=torch.tensor(passes_C), template_RL=padded[0], ngrams_template_GL=padded[1])


@dataclass
class Text:
    """A prompt and its continuation.

    Attributes:
        start: tokens of the prompt.
        sampler: that drew it, where those who propose tokens are told the noise of its draws.
    """

    tokens_S: Tensor
    start: int
    sampler: Sampler | None

    def noise(self, root: int, places: int, vocab_size: int) -> Noise | None:
        """Of the draws after the token at `root`."""
        if self.sampler is None:
            return None
        return self.sampler.noise(root + 1 - self.start, places, vocab_size, self.tokens_S.device)


def likely_paths(
    engine: GraftEngine, texts: list[Text], depth: int, count: int, ngrams: bool = False
) -> list[tuple[int, ...]]:
    """The rank paths that lead to the truth most often, and short hand-made ones behind them if that is few.

    A path leads to it no more often than its parent, so any prefix of the list is closed under parents. Ranks
    are those of the source as a request has it by then: what was just read has its likeliest successor first.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        counts.update(_true_prefixes(engine, text, depth, ngrams))
    ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:count]
    known = set(ranked)
    for hand_made in depth_template((engine.successors.k,) + (4,) * (depth - 1), engine.successors.k - 1):
        if hand_made not in known and len(ranked) < count and (len(hand_made) == 1 or hand_made[:-1] in known):
            ranked.append(hand_made)
            known.add(hand_made)
    return ranked


def _by_depth(
    likeliest: Callable[[Tensor, int, Noise, int], tuple[Tensor, Tensor]], rows_D: Tensor, count: int, noise: Noise
) -> Tensor:
    """The ranked successors of each row of a path, the first at depth 1."""
    return torch.cat(
        [likeliest(rows_D[depth - 1 : depth], count, noise, depth)[0] for depth in range(1, len(rows_D) + 1)]
    )


def _true_prefixes(engine: GraftEngine, text: Text, depth: int, ngrams: bool) -> Iterator[tuple[int, ...]]:
    """At every position as root, the rank path along the text that follows, and every prefix of it."""
    sequence_S, start, vocab_size = text.tokens_S, text.start, engine.target.config.vocab_size
    whole = engine.target.prefill(sequence_S, engine.target.new_cache(len(sequence_S)))
    successors = engine.successors.clone()
    _learn(successors, sequence_S, whole, slice(0, start))
    source = NgramSource(engine.ngrams, successors) if ngrams and engine.ngrams else None
    if source:
        source.read(sequence_S[:start])
    padded_S = torch.cat((sequence_S.new_full((LONGEST - 1,), -1), sequence_S))
    for root in range(start, len(sequence_S) - 1):
        path_D = sequence_S[root : root + depth + 1]
        noise = text.noise(root, depth, vocab_size)
        if source:
            source.read(path_D[:1])
            windows_DC = padded_S[root : root + len(path_D) + LONGEST - 2].unfold(0, LONGEST, 1)
        if noise is None:
            ids_DK = source.successors_of(windows_DC, source.k)[0] if source else successors.ids_VK[path_D[:-1]]
        elif source:
            ids_DK = _by_depth(source.successors_of, windows_DC, source.k, noise)
        else:
            ids_DK = _by_depth(successors.successors_of, path_D[:-1], successors.k, noise)
        found_D, rank_D = (ids_DK == path_D[1:, None]).to(torch.uint8).max(dim=1)
        path = rank_D[: int(found_D.cumprod(0).sum())].tolist()
        yield from (tuple(path[:length]) for length in range(1, len(path) + 1))
        _learn(successors, sequence_S, whole, slice(root, root + 1))


class _Tracer:
    """Plays every position of a continuation as the root of a round."""

    def __init__(
        self,
        engine: GraftEngine,
        topk: int,
        num_steps: int,
        template: list[tuple[int, ...]],
        longer: list[tuple[int, ...]],
        retrieval_depth: int,
        echo_depth: int,
        temperature: float,
    ) -> None:
        self.engine = engine
        self.target = engine.target
        self.topk = topk
        self.num_steps = num_steps
        self.template = Template(template, self.target.device)
        self.longer = Template(longer, self.target.device)
        self.chain = Template([(0,) * depth for depth in range(1, echo_depth + 1)], self.target.device)
        self.depth = max(num_steps, retrieval_depth, echo_depth)
        self.temperature = temperature

    def trace(self, text: Text, index: int) -> dict[str, Tensor]:
        """Columns as in `Traces`."""
        sequence_S, start, length = text.tokens_S, text.start, len(text.tokens_S)
        whole = self.target.prefill(sequence_S, self.target.new_cache(length))
        # Once the noise is told, nothing of a draw is chance.
        by_chance = self.temperature and text.sampler is None
        if by_chance:
            candidates = self.topk + (self.num_steps - 1) * self.topk**2
            looked_up = len(self.template) + len(self.longer) + len(self.chain)
            cache = self.target.new_cache(length + 1 + candidates + looked_up)
            self.target.prefill(sequence_S[:start], cache)
        drafter = Drafter(self.engine.head, self.target, self.topk, length + self.topk * self.num_steps)
        successors = self.engine.successors.clone()
        _learn(successors, sequence_S, whole, slice(0, start))
        ngrams = NgramSource(self.engine.ngrams, successors) if self.engine.ngrams else None
        if ngrams:
            ngrams.read(sequence_S[:start])
        echo = Echo(length + self.depth, self.target.device)
        echo.read(sequence_S[:start])
        rows: list[dict[str, Tensor]] = []
        read = 0  # positions the head has caught up with
        for root in range(start, length - 1):
            noise = text.noise(root, self.depth, self.target.config.vocab_size)
            draft = drafter.begin(sequence_S[read + 1 : root + 1], whole.aux_NE[read:root], noise)
            read = root
            confidence = [draft.confidence]
            while draft.passes < self.num_steps:
                draft = drafter.deepen(draft)
                confidence.append(draft.confidence)
            root_1 = sequence_S[root : root + 1]
            if ngrams:
                ngrams.read(root_1)
            echo.read(root_1)
            tokens_E, matched_1 = echo.find(len(self.chain) - 1)
            drafted = draft.candidates
            retrieved = successors.expand(root_1, self.template, noise)
            longer = (ngrams or successors).expand(root_1, self.longer, noise)
            repeated = self.chain.tree(torch.cat((root_1, tokens_E)), None)
            truth_D = torch.full((self.depth,), -1, device=sequence_S.device)
            following = sequence_S[root + 1 : root + 1 + self.depth]
            truth_D[: len(following)] = following
            trees = (drafted, retrieved, longer, repeated)
            if by_chance:
                reach_C, reach_R, reach_G, reach_E = self._reach(trees, cache)
                cache.commit(1)
            else:
                reach_C, reach_R, reach_G, reach_E = (on_path(tree, truth_D) for tree in trees)
            found_R, found_G = (tree.sources_N[1:] == Source.MATRIX for tree in (retrieved, longer))
            rows.append(
                {
                    "prompt_T": torch.tensor(index),
                    "context_T": torch.tensor(root),
                    "truth_TD": truth_D.to(torch.int32),
                    "confidence_TP": torch.stack(confidence),
                    "tokens_TC": drafted.tokens_N[1:].to(torch.int32),
                    "parents_TC": (drafted.parents_N[1:] - 1).to(torch.int16),
                    "logp_TC": drafted.logp_N[1:],
                    "retrieved_TR": torch.where(found_R, retrieved.tokens_N[1:], -1).to(torch.int32),
                    "retrieved_logp_TR": retrieved.logp_N[1:],
                    "reach_TC": reach_C[1:].float(),
                    "reach_TR": torch.where(found_R, reach_R[1:].float(), 0.0),
                    "ngrams_TG": torch.where(found_G, longer.tokens_N[1:], -1).to(torch.int32),
                    "ngrams_logp_TG": longer.logp_N[1:],
                    "ngrams_reach_TG": torch.where(found_G, reach_G[1:].float(), 0.0),
                    "echo_TE": tokens_E.to(torch.int32),
                    "matched_T": matched_1[0],
                    "echo_reach_TE": torch.where(matched_1 > 0, reach_E[1:].float(), 0.0),
                }
            )
            _learn(successors, sequence_S, whole, slice(root, root + 1))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _reach(self, trees: tuple[DraftTree, ...], cache: object) -> list[Tensor]:
        """P(accepted) of every row of the trees: one target pass over their union."""
        union = trees[0]
        for tree in trees[1:]:
            union = merge(union, tree, len(tree) - 1)
        ancestors_NN = union.ancestors(self.depth)
        logits_NV = self.target.verify(union, ancestors_NN, cache).logits_NV  # type: ignore[arg-type]
        logp_NV = (logits_NV.float() / self.temperature).log_softmax(dim=-1)
        step_N = logp_NV[union.parents_N, union.tokens_N]
        step_N[0] = 0.0
        reach_N = torch.where(ancestors_NN, step_N, 0.0).sum(dim=1).exp()
        places = ((tree.paths_N[:, None] == union.paths_N).to(torch.uint8).argmax(dim=1) for tree in trees)
        return [reach_N[place_M] for place_M in places]


def on_path(tree: DraftTree, truth_D: Tensor) -> Tensor:
    """Which rows lie on the path of these tokens; the root does. [N] bool"""
    token_N = torch.cat((tree.tokens_N[:1], truth_D))[tree.depths_N]
    match_N = (tree.tokens_N == token_N) & (tree.sources_N != Source.EMPTY)
    return ~(tree.ancestors(int(tree.depths_N.max())) & ~match_N).any(dim=1)


def _learn(successors: SuccessorMatrix, sequence_S: Tensor, output: TargetOutput, read: slice) -> None:
    successors.update(sequence_S[read], output.logits_NV[read])
