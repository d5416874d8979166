"""From samples to packed rows, each decided by its number alone, so that training resumes anywhere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graft_inference import GraftError
from graft_train.data.samples import Sample
from graft_train.distill.layout import Layout, make_layout
from graft_train.processes import say

OPEN_BATCHES = 64
"""Batches that still take rows while packing; more would fill little better, and slower."""


@dataclass
class Row:
    """A sample as one sequence.

    Attributes:
        tokens_S: prompt and answer, or a conversation, int64.
        loss_mask_S: bool, the tokens of the answer or answers, the end-of-sequence tokens included.
    """

    tokens_S: Tensor
    loss_mask_S: Tensor


@dataclass
class Batch:
    """Rows one behind the other, without padding.

    Attributes:
        rows: which rows these are.
        answer_tokens: how many of the tokens are the answers'.
    """

    rows: list[int]
    tokens_S: Tensor
    layout: Layout
    answer_tokens: int


def with_room(samples: list[Sample], max_length: int) -> list[Sample]:
    """Those whose prompt leaves room for an answer; the others are counted.

    Raises:
        GraftError: there are none.
    """
    kept = [sample for sample in samples if sample.cut(max_length) is not None]
    if not kept:
        shortest = min(len(sample.prompt_ids) for sample in samples)
        raise GraftError(
            f"the prompts of all {len(samples)} samples fill head.max_length={max_length}, the shortest with "
            f"{shortest} tokens: nothing to train on; raise it"
        )
    if len(kept) < len(samples):
        say(
            f"distill: the prompts of {len(samples) - len(kept)} of {len(samples)} samples fill "
            f"head.max_length={max_length}, and were left out"
        )
    return kept


def to_rows(samples: list[Sample], max_length: int, vocab_size: int) -> list[Row]:
    """One row a sample; longer ones are cut (see `Sample.cut`), which is said.

    A draft reads one token of an answer and predicts the next, so an answer of one token teaches nothing.

    Args:
        samples: `with_room`.

    Raises:
        GraftError: names the sample that holds a token the target lacks; or no answer has two tokens.
    """
    rows, cut, mute = [], 0, 0
    for sample in samples:
        kept = sample.cut(max_length)
        assert kept is not None
        if max(kept.ids) >= vocab_size:
            raise GraftError(
                f"sample {sample.id} holds token {max(kept.ids)}, but the target has {vocab_size} tokens: "
                "these answers were regenerated with another target"
            )
        cut += kept is not sample
        rows.append(Row(torch.tensor(kept.ids, dtype=torch.long), kept.loss_mask_S))
        mute += not (rows[-1].loss_mask_S[1:-1] & rows[-1].loss_mask_S[2:]).any()
    if cut:
        say(f"distill: {cut} of {len(samples)} samples are longer than head.max_length={max_length} and were cut")
    if mute == len(samples):
        raise GraftError(
            f"none of {mute} samples has an answer of two tokens, so there is nothing to train on; regenerate with "
            "more of regenerate.max_new_tokens, or raise head.max_length"
        )
    if mute:
        say(f"distill: {mute} of {len(samples)} samples have answers of one token, which teach nothing")
    return rows


def hold_out(samples: list[Sample], most: int, seed: int) -> tuple[list[int], list[int]]:
    """At most so many rows for validation, and those to train on: a document's rows share text and stay together.

    Where every document has more rows, the smallest gives some for validation and none to train on; a single one both.
    """
    documents: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        documents.setdefault(sample.document, []).append(row)
    rows = list(documents.values())
    validation: list[int] = []
    training: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randperm(len(rows), generator=generator).tolist():
        fits = len(validation) + len(rows[place]) <= most
        (validation if fits else training).extend(rows[place])
    if not validation and most:
        smallest = min(rows, key=len)
        validation = smallest[:most]
        left_out = set(validation if len(rows) == 1 else smallest)
        training = [row for row in training if row not in left_out]
    # The first of them are decoded: of many documents, not of one.
    order = torch.randperm(len(validation), generator=generator).tolist()
    return [validation[place] for place in order], training


def plan_batches(lengths: list[int], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every batch of the training, each epoch in an order of its own."""
    plan = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        plan += pack(lengths, torch.randperm(len(lengths), generator=generator).tolist(), batch_tokens)
    return plan


def pack(lengths: list[int], order: list[int], batch_tokens: int) -> list[list[int]]:
    """First fit: batches of at most `batch_tokens` tokens, or of one longer row, in about this order."""
    batches: list[list[int]] = []
    used: list[int] = []
    for row in order:
        for place in range(max(0, len(batches) - OPEN_BATCHES), len(batches)):
            if used[place] + lengths[row] <= batch_tokens:
                batches[place].append(row)
                used[place] += lengths[row]
                break
        else:
            batches.append([row])
            used.append(lengths[row])
    return batches


def collate(rows: list[Row], chosen: list[int], device: torch.device) -> Batch:
    tokens_S = torch.cat([rows[row].tokens_S for row in chosen])
    loss_mask_S = torch.cat([rows[row].loss_mask_S for row in chosen])
    layout = make_layout([len(rows[row].tokens_S) for row in chosen], loss_mask_S)
    return Batch(chosen, tokens_S.to(device), layout.to(device), int(loss_mask_S.sum()))
