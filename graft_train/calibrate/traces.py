"""What every policy would have met: one record for each position of the target's own continuations.

The sources of a position have learned from the text before it, as in a request whose plan learns from accepted tokens
alone. All else that a round looks at depends on the text alone too. So any plan can be replayed without the models.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from graft_inference import GraftEngine, GraftError
from graft_inference.decode.sampling import Sampler
from graft_inference.files import replace_file
from graft_inference.noise import Noise
from graft_inference.proposer import Opening, Proposal, TokenSource
from graft_inference.retrieval.sources import SOURCES, number_of
from graft_inference.target.model import TargetOutput
from graft_inference.template import RankPaths, Template, chain, depth_template
from graft_inference.tree import DraftTree, Source, drafted_nodes, merge
from graft_train.config.policy import CalibrateConfig
from graft_train.processes import is_main

MOST_CHAINED = 32
"""Tokens that a source with one guess after a token may add to a tree."""


@dataclass
class SourceTraces:
    """What one source proposed at T positions: R candidates, the nodes of a template.

    Attributes:
        tokens_TR: token of each rank path, -1 where it proposed none.
        logp_TR: their cumulative log-probability in the source; 0 where it has none.
        evidence_T: the kind of evidence it went by (`Proposal.evidence_1`); 0 where it has probabilities.
        reach_TR: P(accepted) under the target, that is of all tokens on the path; at temperature 0, and where the noise
            of the draws is told, whether they are those that follow.
        template_RL: the rank paths, padded with -1.
    """

    tokens_TR: Tensor
    logp_TR: Tensor
    evidence_T: Tensor
    reach_TR: Tensor
    template_RL: Tensor

    @property
    def template(self) -> RankPaths:
        return tuple(tuple(rank for rank in path if rank >= 0) for path in self.template_RL.tolist())


@dataclass
class Traces:
    """T positions, P draft steps, C drafted candidates, D depths.

    Attributes:
        prompt_T: which prompt a position belongs to; positions of a prompt stand in order.
        context_T: tokens before the root.
        truth_TD: the tokens that follow the root; -1 past the end of the continuation.
        confidence_TP: the head's confidence after 1..P steps (Graft Eq. 6).
        tokens_TC, parents_TC, logp_TC: the drafted nodes of all steps; parent -1 is the root.
        depths_C: step that proposed each.
        reach_TC: P(accepted), as in `SourceTraces`.
        sources: by name, in the order of SOURCES.
    """

    prompt_T: Tensor
    context_T: Tensor
    truth_TD: Tensor
    confidence_TP: Tensor
    tokens_TC: Tensor
    parents_TC: Tensor
    logp_TC: Tensor
    depths_C: Tensor
    reach_TC: Tensor
    sources: dict[str, SourceTraces]

    def __len__(self) -> int:
        return len(self.prompt_T)

    def save(self, path: Path, made_of: dict[str, Any]) -> None:
        """Writes the traces and what they were made of: fingerprints of target, head, corpus and data, and settings."""
        tensors = {name: getattr(self, name) for name in COLUMNS}
        for source, traced in self.sources.items():
            tensors |= {f"{source}.{one.name}": getattr(traced, one.name) for one in fields(SourceTraces)}
        metadata = {"made_of": json.dumps(made_of, sort_keys=True)}
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        replace_file(path, lambda aside: save_file(whole, aside, metadata))


COLUMNS = [column.name for column in fields(Traces) if column.name != "sources"]


@torch.inference_mode()
def record_traces(
    engine: GraftEngine,
    prompts: list[Tensor],
    settings: CalibrateConfig,
    shares_noise: bool = False,
    positions: int | None = None,
) -> Traces:
    """Traces a continuation of each prompt ([length] int64), with room for more retrieved nodes than a plan verifies.

    Args:
        shares_noise: whether head and sources are told the noise of the draws, as plans say by the same name.
        positions: once there are so many, no further prompt is traced.
    """
    bar = tqdm(prompts, desc="calibrate: continuations", unit="prompt", disable=not is_main())
    texts: list[Text] = []
    for index, prompt in enumerate(bar):
        whole = engine.generate(
            prompt, settings.max_new_tokens, settings.temperature, "autoregressive", seed=index
        ).sequences[0]
        sampler = Sampler.of(settings.temperature, index)
        texts.append(Text(whole.to(engine.target.device), len(prompt), sampler if shares_noise else None))
        if positions is not None and sum(len(text.tokens_S) - text.start - 1 for text in texts) >= positions:
            break
    templates = {name: likely_paths(engine, texts, name, settings) for name in SOURCES}
    tracer = _Tracer(engine, templates, settings)
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
    sources = {}
    for name, template in templates.items():
        longest = max(map(len, template), default=1)
        padded = [[*path, *[-1] * (longest - len(path))] for path in template]
        own = {one.name: columns.pop(f"{name}.{one.name}") for one in fields(SourceTraces)[:-1]}
        sources[name] = SourceTraces(**own, template_RL=torch.tensor(padded).view(-1, longest).long())
    k, steps = settings.topk, settings.num_steps
    depths_C = torch.tensor([1] * k + [step for step in range(2, steps + 1) for _ in range(k**2)])
    return Traces(**columns, depths_C=depths_C, sources=sources)


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

    def open(self, engine: GraftEngine, name: str, whole: TargetOutput, room: int = 0) -> TokenSource:
        """A source as it is when the prompt has been read.

        Args:
            whole: what the target says of the text.
            room: tokens beyond the text.
        """
        prompt_S = self.tokens_S[: self.start]
        source = SOURCES[name].open(Opening(prompt_S, len(self.tokens_S) + room, engine.tables))
        if source.learns:
            source.learn(prompt_S, whole.logits_NV[: self.start])
        return source


def likely_paths(engine: GraftEngine, texts: list[Text], name: str, settings: CalibrateConfig) -> RankPaths:
    """The rank paths of a source that lead to the truth most often, and hand-made ones behind them if that is few.

    A path leads to it no more often than its parent, so any prefix of the list is closed under parents. Ranks
    are those of the source as a request has it by then: what was just read has its likeliest successor first.
    """
    ranks = SOURCES[name].most_ranks(engine.tables)
    if ranks == 1:
        return chain(min(max(settings.num_draft_tokens) - 1, MOST_CHAINED))
    count, depth = 4 * max(settings.num_draft_tokens), settings.retrieval_depth
    counts: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        counts.update(_true_prefixes(engine, text, name, depth))
    ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:count]
    known = set(ranked)
    for hand_made in depth_template((ranks,) + (4,) * (depth - 1), ranks - 1):
        if hand_made not in known and len(ranked) < count and (len(hand_made) == 1 or hand_made[:-1] in known):
            ranked.append(hand_made)
            known.add(hand_made)
    return tuple(ranked)


def _true_prefixes(engine: GraftEngine, text: Text, name: str, depth: int) -> Iterator[tuple[int, ...]]:
    """At every position as root, the rank path along the text that follows, and every prefix of it."""
    sequence_S, vocab_size = text.tokens_S, engine.target.config.vocab_size
    whole = engine.target.prefill(sequence_S, engine.target.new_cache(len(sequence_S)))
    source = text.open(engine, name, whole)
    for root in range(text.start, len(sequence_S) - 1):
        path_D = sequence_S[root : root + depth + 1]
        source.extend(path_D[:1])
        ids_DK = source.ranked(path_D[:-1], text.noise(root, depth, vocab_size))
        assert ids_DK is not None, f"{name} has several guesses after a token, but does not rank them"
        found_D, rank_D = (ids_DK == path_D[1:, None]).to(torch.uint8).max(dim=1)
        path = rank_D[: int(found_D.cumprod(0).sum())].tolist()
        yield from (tuple(path[:length]) for length in range(1, len(path) + 1))
        if source.learns:
            source.learn(sequence_S[root : root + 1], whole.logits_NV[root : root + 1])


class _Tracer:
    """Plays every position of a continuation as the root of a round."""

    def __init__(self, engine: GraftEngine, templates: Mapping[str, RankPaths], settings: CalibrateConfig) -> None:
        self.engine, self.target = engine, engine.target
        self.topk, self.num_steps, self.temperature = settings.topk, settings.num_steps, settings.temperature
        device = self.target.device
        self.templates = {name: Template(paths, device, number_of(name)) for name, paths in templates.items()}
        deepest = max((len(path) for paths in templates.values() for path in paths), default=1)
        self.depth = max(self.num_steps, deepest)

    def trace(self, text: Text, index: int) -> dict[str, Tensor]:
        """Columns as in `Traces`, those of a source behind its name."""
        sequence_S, start, length = text.tokens_S, text.start, len(text.tokens_S)
        whole = self.target.prefill(sequence_S, self.target.new_cache(length))
        # Once the noise is told, nothing of a draw is chance.
        by_chance = self.temperature and text.sampler is None
        if by_chance:
            candidates = drafted_nodes(self.topk, self.num_steps) + sum(map(len, self.templates.values()))
            cache = self.target.new_cache(length + 1 + candidates)
            self.target.prefill(sequence_S[:start], cache)
        proposer = self.engine.speculator.head
        head = proposer.open(self.topk, self.num_steps, length)
        sources = {name: text.open(self.engine, name, whole, self.depth) for name in self.templates}
        rows: list[dict[str, Tensor]] = []
        read = 0  # positions the head has caught up with
        for root in range(start, length - 1):
            noise = text.noise(root, self.depth, self.target.config.vocab_size)
            fresh = sequence_S[read + 1 : root + 1], whole.aux_NE[read:root]
            drafts, read = proposer.begin([head], [fresh], [sequence_S[root : root + 1]], [noise]), root
            confidence = [drafts[0].confidence]
            while drafts[0].steps < self.num_steps:
                drafts = proposer.deepen([head], drafts)
                confidence.append(drafts[0].confidence)
            root_1 = sequence_S[root : root + 1]
            proposals = {
                name: _proposed(source, root_1, self.templates[name], noise) for name, source in sources.items()
            }
            truth_D = torch.full((self.depth,), -1, device=sequence_S.device)
            following = sequence_S[root + 1 : root + 1 + self.depth]
            truth_D[: len(following)] = following
            drafted = drafts[0].candidates
            trees = [drafted, *(one.tree for one in proposals.values())]
            if by_chance:
                reach_C, *reached = self._reach(trees, cache)
                cache.commit(1)
            else:
                reach_C, *reached = (on_path(tree, truth_D) for tree in trees)
            row = {
                "prompt_T": torch.tensor(index),
                "context_T": torch.tensor(root),
                "truth_TD": truth_D.to(torch.int32),
                "confidence_TP": torch.stack(confidence),
                "tokens_TC": drafted.tokens_N[1:].to(torch.int32),
                "parents_TC": (drafted.parents_N[1:] - 1).to(torch.int16),
                "logp_TC": drafted.logp_N[1:],
                "reach_TC": reach_C[1:].float(),
            }
            for (name, proposal), reach_R in zip(proposals.items(), reached, strict=True):
                row |= {f"{name}.{column}": value for column, value in _columns(proposal, reach_R).items()}
            rows.append(row)
            for source in sources.values():
                if source.learns:
                    source.learn(root_1, whole.logits_NV[root : root + 1])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _reach(self, trees: list[DraftTree], cache: Any) -> list[Tensor]:
        """P(accepted) of every node of the trees: one target pass over their union."""
        union = trees[0]
        for tree in trees[1:]:
            union = merge(union, tree, len(tree) - 1)
        ancestors_NN = union.ancestors(self.depth)
        logits_NV = self.target.verify(union, ancestors_NN, cache).logits_NV
        logp_NV = (logits_NV.float() / self.temperature).log_softmax(dim=-1)
        step_N = logp_NV[union.parents_N, union.tokens_N]
        step_N[0] = 0.0
        reach_N = torch.where(ancestors_NN, step_N, 0.0).sum(dim=1).exp()
        places = ((tree.paths_N[:, None] == union.paths_N).to(torch.uint8).argmax(dim=1) for tree in trees)
        return [reach_N[place_M] for place_M in places]


def _proposed(source: TokenSource, root_1: Tensor, template: Template, noise: Noise | None) -> Proposal:
    source.extend(root_1)
    return source.propose(root_1, template, noise)


def _columns(proposal: Proposal, reach_R: Tensor) -> dict[str, Tensor]:
    """Of `SourceTraces`, at one position."""
    tree, evidence_1 = proposal.tree, proposal.evidence_1
    found_R = tree.sources_N[1:] != Source.EMPTY
    if evidence_1 is not None:
        found_R = found_R & (evidence_1 > 0)
    return {
        "tokens_TR": torch.where(found_R, tree.tokens_N[1:], -1).to(torch.int32),
        "logp_TR": tree.logp_N[1:],
        "evidence_T": torch.zeros((), dtype=torch.long) if evidence_1 is None else evidence_1[0],
        "reach_TR": torch.where(found_R, reach_R[1:].float(), 0.0),
    }


def on_path(tree: DraftTree, truth_D: Tensor) -> Tensor:
    """Which nodes lie on the path of these tokens; the root does. [N] bool"""
    token_N = torch.cat((tree.tokens_N[:1], truth_D))[tree.depths_N]
    match_N = (tree.tokens_N == token_N) & (tree.sources_N != Source.EMPTY)
    return ~(tree.ancestors(int(tree.depths_N.max())) & ~match_N).any(dim=1)
