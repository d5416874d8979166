"""What every policy would have met: one record for each position of the target's greedy continuations.

The accepted path of any plan is a prefix of the target's own continuation. So for a position it is enough
to know, for every number of head passes, how confident the head was and how well it had ranked the nodes
on that path, and by which successor ranks the matrix reaches them. Any plan can then be replayed without
the models.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from graft_inference import GraftEngine
from graft_inference.drafting import Drafter
from graft_inference.tree import DraftTree, child_paths

MISSING = np.iinfo(np.int32).max


@dataclass
class Traces:
    """T positions, P head passes, D depths.

    Attributes:
        prompt_T: which prompt a position belongs to; positions of a prompt stand in order.
        remaining_T: tokens of the continuation that follow the root.
        confidence_TP: the head's confidence after 1..P passes (Graft Eq. 6).
        drafted_rank_TPP: [t, p, d] place by score, from 1, that the true node at depth d+1 takes among
            the candidates of p+1 passes; MISSING where it is not among them.
        successor_rank_TD: rank of each true token among the successors of the one before; -1 from the
            first token on that the matrix lacks.
    """

    prompt_T: np.ndarray
    remaining_T: np.ndarray
    confidence_TP: np.ndarray
    drafted_rank_TPP: np.ndarray
    successor_rank_TD: np.ndarray

    def save(self, path: Path) -> None:
        save_file({name: np.ascontiguousarray(array) for name, array in asdict(self).items()}, path)


@torch.inference_mode()
def record_traces(
    engine: GraftEngine,
    prompts: list[Tensor],
    max_new_tokens: int,
    beam_width: int,
    max_passes: int,
    retrieval_depth: int,
) -> Traces:
    """Traces the greedy continuation of each prompt ([length] int64)."""
    parts = []
    for index, prompt in enumerate(tqdm(prompts, desc="calibrate: traces", unit="prompt")):
        sequence = engine.generate(prompt, max_new_tokens, method="autoregressive").sequences[0]
        parts.append(_trace(engine, sequence, len(prompt), index, beam_width, max_passes, retrieval_depth))
    columns = zip(*parts, strict=True)
    return Traces(*(np.concatenate(column) for column in columns))


def _trace(
    engine: GraftEngine,
    sequence_S: Tensor,
    start: int,
    index: int,
    beam_width: int,
    max_passes: int,
    retrieval_depth: int,
) -> tuple[np.ndarray, ...]:
    """Every position of one continuation as the root of a round, columns as in `Traces`."""
    target, length = engine.target, len(sequence_S)
    sequence_S = sequence_S.to(target.device)
    output = target.prefill(sequence_S, target.new_cache(length))
    drafter = Drafter(engine.head, target, beam_width, length + beam_width * max_passes)
    successors = engine.successors.clone()
    successors.update(sequence_S[:start], output.logits_NV[:start])
    tokens = sequence_S.tolist()
    confidences, drafted, retrieved = [], [], []
    read = 0  # positions the head has caught up with
    for root in range(start, length - 1):
        fresh = slice(read, root)
        draft = drafter.begin(sequence_S[read + 1 : root + 1], output.taps_NE[fresh])
        read = root
        truth_D = sequence_S[root + 1 : root + 1 + max_passes]
        sizes, confidence = [len(draft.candidates)], [draft.confidence]
        while draft.passes < max_passes:
            draft = drafter.deepen(draft)
            sizes.append(len(draft.candidates))
            confidence.append(draft.confidence)
        confidences.append(torch.stack(confidence).cpu().numpy())
        drafted.append(_true_ranks(draft.candidates, truth_D, sizes))
        retrieved.append(
            _successor_ranks(successors.ids_VK, tokens[root : root + 1 + retrieval_depth], retrieval_depth)
        )
        successors.update(sequence_S[root : root + 1], output.logits_NV[root : root + 1])
    count = length - 1 - start
    return (
        np.full(count, index, dtype=np.int32),
        np.arange(count, 0, -1, dtype=np.int32),
        np.stack(confidences).astype(np.float32),
        np.stack(drafted),
        np.stack(retrieved),
    )


def _true_ranks(candidates: DraftTree, truth_D: Tensor, sizes: list[int]) -> np.ndarray:
    """[P, P]: place of the true node of each depth among the candidates of each number of passes."""
    passes = len(sizes)
    ranks = np.full((passes, passes), MISSING, dtype=np.int32)
    path = candidates.paths_N[0]
    for depth, token in enumerate(truth_D, start=1):
        path = child_paths(path, token)
        rows = (candidates.paths_N == path).nonzero()
        if len(rows) == 0:
            break
        row = int(rows[0])
        score = candidates.logp_N[row]
        # Stable order: an equal score that stands earlier comes first, as in DraftTree.best.
        earlier_N = candidates.logp_N > score
        earlier_N[:row] |= candidates.logp_N[:row] == score
        before_N = earlier_N.cumsum(0)
        for index in range(depth - 1, passes):
            ranks[index, depth - 1] = int(before_N[sizes[index] - 1])
    return ranks


def _successor_ranks(ids_VK: Tensor, tokens: list[int], depth: int) -> np.ndarray:
    """[D]: rank of each token among its predecessor's successors, -1 from the first miss on."""
    ranks = np.full(depth, -1, dtype=np.int32)
    for index, (token, successor) in enumerate(pairwise(tokens)):
        row = ids_VK[token].tolist()
        if successor not in row:
            break
        ranks[index] = row.index(successor)
    return ranks
