"""What every policy would have met: one record for each position of the target's own continuations.

The matrix of a position has learned from the text before it, as in a request whose plan learns from
accepted tokens alone. All else that a round looks at depends on the text alone too. So any plan can be
replayed without the models.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from graft_inference import GraftEngine, GraftError
from graft_inference.drafting import Drafter
from graft_inference.policy import RankPaths, depth_template
from graft_inference.retrieval import SuccessorMatrix, Template
from graft_inference.target import TargetOutput
from graft_inference.tree import DraftTree, Source, merge


@dataclass
class Traces:
    """T positions, P head passes, C drafted and R retrieved candidates (their roots left out), D depths.

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
        reach_TC, reach_TR: P(accepted) under the target, that is of all tokens on the path; at temperature
            0 whether they are the greedy ones.
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

    def __len__(self) -> int:
        return len(self.prompt_T)

    @property
    def template(self) -> RankPaths:
        return tuple(tuple(rank for rank in path if rank >= 0) for path in self.template_RL.tolist())

    def save(self, path: Path, made_of: dict[str, str]) -> None:
        """Writes the traces and what they were made of: fingerprints of target, head, corpus and data."""
        tensors = {column.name: getattr(self, column.name).contiguous() for column in fields(self)}
        save_file(tensors, path, {"made_of": json.dumps(made_of, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, made_of: dict[str, str]) -> "Traces":
        """Raises GraftError for a missing or damaged file, or one made of other weights or data."""
        try:
            with safe_open(path, "pt") as file:
                recorded = json.loads((file.metadata() or {}).get("made_of", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise GraftError(
                f"{path} cannot be read ({error}): run recipes/calibrate.py without latency_only"
            ) from error
        for name, expected in made_of.items():
            if recorded.get(name) != expected:
                raise GraftError(
                    f"{path} was traced with another {name} ({recorded.get(name)}, now {expected}): delete "
                    f"{path.parent} and run recipes/calibrate.py without policy.latency_only"
                )
        if set(tensors) != {column.name for column in fields(cls)}:
            raise GraftError(f"{path} is not a file of traces; delete {path.parent} and run recipes/calibrate.py")
        return cls(**tensors)


@torch.inference_mode()
def record_traces(
    engine: GraftEngine,
    prompts: list[Tensor],
    max_new_tokens: int,
    beam_width: int,
    max_passes: int,
    retrieval_depth: int,
    paths: int,
    temperature: float = 0.0,
) -> Traces:
    """Traces a continuation of each prompt ([length] int64).

    Args:
        paths: retrieved nodes looked up at every position: those rank paths that lead to the truth most often.
    """
    bar = tqdm(prompts, desc="calibrate: continuations", unit="prompt")
    sequences = [
        engine.generate(prompt, max_new_tokens, temperature, "autoregressive", seed=index).sequences[0]
        for index, prompt in enumerate(bar)
    ]
    starts = [len(prompt) for prompt in prompts]
    template = likely_paths(engine, sequences, starts, retrieval_depth, paths)
    tracer = _Tracer(engine, beam_width, max_passes, template, retrieval_depth, temperature)
    parts = []
    for index, sequence in enumerate(tqdm(sequences, desc="calibrate: traces", unit="prompt")):
        parts.append(tracer.trace(sequence.to(engine.target.device), starts[index], index))
    if not any(parts):
        raise GraftError("the target ended every calibration prompt at once: regenerate from other data")
    names = next(part for part in parts if part)
    columns = {name: torch.cat([part[name] for part in parts if part]).cpu() for name in names}
    passes_C = [1] * beam_width + [p for p in range(2, max_passes + 1) for _ in range(beam_width**2)]
    padded = [[*path, *[-1] * (retrieval_depth - len(path))] for path in template]
    return Traces(**columns, depths_C=torch.tensor(passes_C), template_RL=torch.tensor(padded))


def likely_paths(
    engine: GraftEngine, sequences: list[Tensor], starts: list[int], depth: int, count: int
) -> list[tuple[int, ...]]:
    """The rank paths that lead to the truth most often, and short hand-made ones behind them if that is few.

    A path leads to it no more often than its parent, so any prefix of the list is closed under parents. Ranks
    are those of the matrix as a request has it by then: what was just read has its likeliest successor first.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for sequence, start in zip(sequences, starts, strict=True):
        counts.update(_true_prefixes(engine, sequence.to(engine.target.device), start, depth))
    ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:count]
    known = set(ranked)
    for hand_made in depth_template((engine.successors.k,) + (4,) * (depth - 1), engine.successors.k - 1):
        if hand_made not in known and len(ranked) < count and (len(hand_made) == 1 or hand_made[:-1] in known):
            ranked.append(hand_made)
            known.add(hand_made)
    return ranked


def _true_prefixes(engine: GraftEngine, sequence_S: Tensor, start: int, depth: int) -> Iterator[tuple[int, ...]]:
    """At every position as root, the rank path along the text that follows, and every prefix of it."""
    whole = engine.target.prefill(sequence_S, engine.target.new_cache(len(sequence_S)))
    successors = engine.successors.clone()
    _learn(successors, sequence_S, whole, slice(0, start))
    for root in range(start, len(sequence_S) - 1):
        text_D = sequence_S[root : root + depth + 1]
        found_D, rank_D = (successors.ids_VK[text_D[:-1]] == text_D[1:, None]).to(torch.uint8).max(dim=1)
        path = rank_D[: int(found_D.cumprod(0).sum())].tolist()
        yield from (tuple(path[:length]) for length in range(1, len(path) + 1))
        _learn(successors, sequence_S, whole, slice(root, root + 1))


class _Tracer:
    """Plays every position of a continuation as the root of a round."""

    def __init__(
        self,
        engine: GraftEngine,
        beam_width: int,
        max_passes: int,
        template: list[tuple[int, ...]],
        retrieval_depth: int,
        temperature: float,
    ) -> None:
        self.engine = engine
        self.target = engine.target
        self.beam_width = beam_width
        self.max_passes = max_passes
        self.template = Template(template, self.target.device)
        self.depth = max(max_passes, retrieval_depth)
        self.temperature = temperature

    def trace(self, sequence_S: Tensor, start: int, index: int) -> dict[str, Tensor]:
        """Columns as in `Traces`."""
        length = len(sequence_S)
        whole = self.target.prefill(sequence_S, self.target.new_cache(length))
        if self.temperature:
            candidates = self.beam_width + (self.max_passes - 1) * self.beam_width**2
            cache = self.target.new_cache(length + 1 + candidates + len(self.template))
            self.target.prefill(sequence_S[:start], cache)
        drafter = Drafter(self.engine.head, self.target, self.beam_width, length + self.beam_width * self.max_passes)
        successors = self.engine.successors.clone()
        _learn(successors, sequence_S, whole, slice(0, start))
        rows: list[dict[str, Tensor]] = []
        read = 0  # positions the head has caught up with
        for root in range(start, length - 1):
            draft = drafter.begin(sequence_S[read + 1 : root + 1], whole.taps_NE[read:root])
            read = root
            confidence = [draft.confidence]
            while draft.passes < self.max_passes:
                draft = drafter.deepen(draft)
                confidence.append(draft.confidence)
            retrieved = successors.expand(sequence_S[root : root + 1], self.template)
            truth_D = torch.full((self.depth,), -1, device=sequence_S.device)
            following = sequence_S[root + 1 : root + 1 + self.depth]
            truth_D[: len(following)] = following
            drafted = draft.candidates
            if self.temperature:
                reach_C, reach_R = self._reach(drafted, retrieved, cache)
                cache.commit(1)
            else:
                reach_C, reach_R = on_path(drafted, truth_D), on_path(retrieved, truth_D)
            found_R = retrieved.sources_N[1:] == Source.RETRIEVED
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
                }
            )
            _learn(successors, sequence_S, whole, slice(root, root + 1))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _reach(self, drafted: DraftTree, retrieved: DraftTree, cache: object) -> tuple[Tensor, Tensor]:
        """P(accepted) of every row of both trees: one target pass over their union."""
        union = merge(drafted, retrieved, len(retrieved))
        ancestors_NN = union.ancestors(self.depth)
        logits_NV = self.target.verify(union, ancestors_NN, cache).logits_NV  # type: ignore[arg-type]
        logp_NV = (logits_NV.float() / self.temperature).log_softmax(dim=-1)
        step_N = logp_NV[union.parents_N, union.tokens_N]
        step_N[0] = 0.0
        reach_N = torch.where(ancestors_NN, step_N, 0.0).sum(dim=1).exp()
        place_R = (retrieved.paths_N[:, None] == union.paths_N).to(torch.uint8).argmax(dim=1)
        return reach_N[: len(drafted)], reach_N[place_R]


def on_path(tree: DraftTree, truth_D: Tensor) -> Tensor:
    """Which rows lie on the path of these tokens; the root does. [N] bool"""
    token_N = torch.cat((tree.tokens_N[:1], truth_D))[tree.depths_N]
    match_N = (tree.tokens_N == token_N) & (tree.sources_N != Source.EMPTY)
    return ~(tree.ancestors(int(tree.depths_N.max())) & ~match_N).any(dim=1)


def _learn(successors: SuccessorMatrix, sequence_S: Tensor, output: TargetOutput, read: slice) -> None:
    successors.update(sequence_S[read], output.logits_NV[read])
