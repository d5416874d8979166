"""From samples to (context, successor) pairs: what followed, or what the target says should follow."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_train.build_corpus.counts import ONE, OTHER, Pairs
from graft_train.data.samples import Sample, parse_sample

WINDOW_BYTES = 1 << 20
"""Lines are read, dealt to the processes and resumed in windows of about this size."""
CHUNK = 1024
"""Positions whose logits are in fp32 at a time."""


@dataclass
class Window:
    """A unit of the data: its number, where its lines begin in the file, and the lines."""

    number: int
    line: int
    lines: list[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.lines))


def windows(path: Path) -> Iterator[Window]:
    """The file in windows that depend on nothing but its content.

    Raises:
        GraftError: there is no such file.
    """
    if not path.is_file():
        raise GraftError(f"{path} does not exist; run graft regenerate first")
    number, line, lines, size = 0, 1, [], 0
    with path.open("rb") as file:
        for text in file:
            lines.append(text)
            size += len(text)
            if size >= WINDOW_BYTES:
                yield Window(number, line, lines)
                number, line, lines, size = number + 1, line + len(lines), [], 0
    if lines:
        yield Window(number, line, lines)


def is_held_out(sample: Sample, share: float) -> bool:
    """Chosen by a hash of its document, so that the order and number of samples do not matter."""
    place = int.from_bytes(hashlib.sha256(f"corpus:{sample.document}".encode()).digest()[:8], "big")
    return place < share * (1 << 64)


def samples_of(window: Window, path: Path, vocab_size: int) -> list[Sample]:
    """The training samples of a window.

    Raises:
        GraftError: a line that is no sample, or token ids outside the target's vocabulary; names the line.
    """
    chosen = []
    for number, text in enumerate(window.lines, start=window.line):
        sample = parse_sample(text, f"{path}, line {number}")
        if max(max(sample.prompt_ids), max(sample.answer_ids, default=0)) >= vocab_size:
            raise GraftError(
                f"{path}, line {number}: sample {sample.id} has token ids outside the target's vocabulary of "
                f"{vocab_size}; it was made with another tokenizer: run graft regenerate for this target"
            )
        if sample.split == "train":
            chosen.append(sample)
    return chosen


@dataclass
class Counted:
    """A sample, and after which of its tokens what follows counts. counted_S: bool"""

    sample: Sample
    counted_S: np.ndarray

    def __len__(self) -> int:
        return len(self.sample.ids)


def counted(samples: list[Sample], prompts: bool) -> list[Counted]:
    """Which tokens of the samples count.

    A conversation that gives one sample an answer repeats in each what came before: that counts once.

    Args:
        prompts: whether the tokens of prompts count as successors; if not, those of answers alone do, so that
            the token before an answer is the first whose successor counts.
    """
    found: list[Counted] = []
    earlier: dict[str, Counted] = {}
    for sample in samples:
        if not prompts:
            loss_mask_S = sample.loss_mask_S.numpy()
            found.append(Counted(sample, np.append(loss_mask_S[1:], loss_mask_S[-1:])))
            continue
        one = Counted(sample, np.ones(len(sample.ids), dtype=bool))
        found.append(one)
        if not sample.is_turn:
            continue
        if before := earlier.get(sample.document):
            repeated = _shared(before.sample.ids, sample.ids)
            one.counted_S[: max(repeated - 1, 0)] = False
            if repeated == len(before):
                before.counted_S[-1] = False  # it counts here, where something follows
        earlier[sample.document] = one
    return found


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    differs = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differs.argmax()) if differs.any() else length


def text_pairs(samples: list[Counted]) -> Pairs:
    """What follows each token that counts; each weighs ONE."""
    tokens_S = np.fromiter(chain.from_iterable(one.sample.ids for one in samples), dtype=np.int64)
    ends_B = np.cumsum([len(one) for one in samples]) - 1
    counted_S = np.concatenate([one.counted_S for one in samples])
    counted_S[ends_B] = False  # what comes next is another sample
    places_P = np.flatnonzero(counted_S)
    return Pairs(tokens_S[places_P], tokens_S[places_P + 1], np.full(len(places_P), ONE))


@torch.inference_mode()
def predicted_pairs(model: Any, samples: list[Counted], k: int, batch_tokens: int) -> Iterator[Pairs]:
    """The target's top k after each token that counts, and all OTHER successors together.

    Batches depend on the samples alone, so that rounding does too.
    """
    for batch in batches(samples, batch_tokens):
        ids_BS, counted_BS = pad(batch, model.device)
        real_BS = ids_BS >= 0
        logits_BSV = model(input_ids=ids_BS.clamp(min=0), attention_mask=real_BS.long(), use_cache=False).logits
        for tokens_M, logits_MV in zip(
            ids_BS[counted_BS].split(CHUNK), logits_BSV[counted_BS].split(CHUNK), strict=True
        ):
            yield weigh(tokens_M, logits_MV, k)


def weigh(tokens_M: Tensor, logits_MV: Tensor, k: int) -> Pairs:
    """The likeliest k successors of M tokens, and all OTHER together; the weights of each token add up to ONE."""
    logits_MV = logits_MV.float()
    top = logits_MV.topk(k, dim=-1)
    probs_MK = (top.values - logits_MV.logsumexp(dim=-1, keepdim=True)).double().exp()
    weights_MK = (probs_MK * ONE).round().long()
    weights_MK[:, :1] -= (weights_MK.sum(dim=-1, keepdim=True) - ONE).clamp(min=0)  # rounded up too often
    others_M1 = ONE - weights_MK.sum(dim=-1, keepdim=True)
    return _flat(tokens_M, top.indices, weights_MK, others_M1)


def matrix_pairs(matrix: SuccessorMatrix, counts_V: Tensor) -> Pairs:
    """The pairs of a matrix whose rows have been seen `counts_V` times each."""
    assert matrix.probs_VK is not None
    seen_C = counts_V.nonzero()[:, 0]
    ids_CK, totals_C1 = matrix.ids_VK[seen_C].long(), counts_V[seen_C, None] * ONE
    weights_CK = (matrix.probs_VK[seen_C].double() * totals_C1).long().masked_fill(ids_CK < 0, 0)
    # fp16 may have rounded a row's sum above 1.
    weights_CK[:, :1] -= (weights_CK.sum(dim=1, keepdim=True) - totals_C1).clamp(min=0)
    return _flat(seen_C, ids_CK.where(ids_CK >= 0, OTHER), weights_CK, totals_C1 - weights_CK.sum(dim=1, keepdim=True))


def _flat(contexts_C: Tensor, successors_CK: Tensor, weights_CK: Tensor, others_C1: Tensor) -> Pairs:
    """The listed successors of each context, and the weight of all OTHER ones."""
    successors_CK = torch.cat((successors_CK, torch.full_like(others_C1, OTHER)), dim=1)
    weights_CK = torch.cat((weights_CK, others_C1), dim=1)
    columns = contexts_C[:, None].expand_as(weights_CK), successors_CK, weights_CK
    return Pairs(*(column.flatten().cpu().numpy() for column in columns))


def batches(samples: list[Counted], batch_tokens: int) -> Iterator[list[Counted]]:
    """Samples by length, as many at a time as fit the padded budget (at least one)."""
    batch: list[Counted] = []
    for one in sorted(samples, key=len):
        if batch and len(one) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def pad(batch: list[Counted], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, S] padded right with -1, and whether what follows each counts."""
    ids_BS = torch.full((len(batch), max(map(len, batch))), -1)
    counted_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for row, one in enumerate(batch):
        ids_BS[row, : len(one)] = torch.tensor(one.sample.ids)
        counted_BS[row, : len(one)] = torch.from_numpy(one.counted_S)
    return ids_BS.to(device), counted_BS.to(device)
