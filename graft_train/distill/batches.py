"""From samples to packed batches, each decided by its number alone, so that training resumes anywhere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_train.data.samples import Sample
from graft_train.processes import say

OPEN_BATCHES = 64
"""Batches that still take samples while packing; more would fill little better, and slower."""


@dataclass
class TokenSample:
    """A sample as tensors, cut to the length that is trained on.

    Attributes:
        tokens_S: prompt and answer, or a conversation, int64.
        loss_mask_S: bool, the tokens of the answer or answers, the end-of-sequence tokens included.
    """

    tokens_S: Tensor
    loss_mask_S: Tensor


@dataclass
class PackedBatch:
    """Samples one behind the other, without padding: a micro-batch.

    Attributes:
        samples: the numbers of these samples.
        lengths: tokens of each, in the same order.
        tokens_S: int64.
        loss_mask_S: bool, the answers' tokens; on the CPU, where it is decided which positions are trained.
    """

    samples: list[int]
    lengths: list[int]
    tokens_S: Tensor
    loss_mask_S: Tensor


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


def to_tensors(samples: list[Sample], max_length: int, vocab_size: int) -> list[TokenSample]:
    """Turns samples into tensors; longer ones are cut (see `Sample.cut`), which is said.

    A draft reads one token of an answer and predicts the next, so an answer of one token teaches nothing.

    Args:
        samples: `with_room`.

    Raises:
        GraftError: names the sample that holds a token the target lacks; or no answer has two tokens.
    """
    tensors, cut, mute = [], 0, 0
    for sample in samples:
        kept = sample.cut(max_length)
        assert kept is not None
        if max(kept.ids) >= vocab_size:
            raise GraftError(
                f"sample {sample.id} holds token {max(kept.ids)}, but the target has {vocab_size} tokens: "
                "these answers were regenerated with another target"
            )
        cut += kept is not sample
        tensors.append(TokenSample(torch.tensor(kept.ids, dtype=torch.long), kept.loss_mask_S))
        mute += not (kept.loss_mask_S[1:-1] & kept.loss_mask_S[2:]).any()
    if cut:
        say(f"distill: {cut} of {len(samples)} samples are longer than head.max_length={max_length} and were cut")
    if mute == len(samples):
        raise GraftError(
            f"none of {mute} samples has an answer of two tokens, so there is nothing to train on; regenerate with "
            "more of regenerate.max_new_tokens, or raise head.max_length"
        )
    if mute:
        say(f"distill: {mute} of {len(samples)} samples have answers of one token, which teach nothing")
    return tensors


def hold_out(samples: list[Sample], most: int, seed: int) -> tuple[list[int], list[int]]:
    """At most so many samples for validation, and those to train on: those of a document share text, stay together.

    Where every document has more samples, the smallest gives some for validation and none to train on; a single one
    both.
    """
    documents: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        documents.setdefault(sample.document, []).append(number)
    groups = list(documents.values())
    validation: list[int] = []
    training: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randperm(len(groups), generator=generator).tolist():
        fits = len(validation) + len(groups[place]) <= most
        (validation if fits else training).extend(groups[place])
    if not validation and most:
        smallest = min(groups, key=len)
        validation = smallest[:most]
        left_out = set(validation if len(groups) == 1 else smallest)
        training = [number for number in training if number not in left_out]
    # The first of them are decoded: of many documents, not of one.
    order = torch.randperm(len(validation), generator=generator).tolist()
    return [validation[place] for place in order], training


def plan_batches(lengths: list[int], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """The samples' numbers of every batch of the training, each epoch in an order of its own."""
    plan = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        plan += pack(lengths, torch.randperm(len(lengths), generator=generator).tolist(), batch_tokens)
    return plan


def pack(lengths: list[int], order: list[int], batch_tokens: int) -> list[list[int]]:
    """First fit: batches of at most `batch_tokens` tokens, or of one longer sample, in about this order."""
    batches: list[list[int]] = []
    used: list[int] = []
    for number in order:
        for place in range(max(0, len(batches) - OPEN_BATCHES), len(batches)):
            if used[place] + lengths[number] <= batch_tokens:
                batches[place].append(number)
                used[place] += lengths[number]
                break
        else:
            batches.append([number])
            used.append(lengths[number])
    return batches


def collate(samples: list[TokenSample], chosen: list[int], device: torch.device) -> PackedBatch:
    tokens_S = torch.cat([samples[number].tokens_S for number in chosen])
    loss_mask_S = torch.cat([samples[number].loss_mask_S for number in chosen])
    lengths = [len(samples[number].tokens_S) for number in chosen]
    return PackedBatch(chosen, lengths, tokens_S.to(device), loss_mask_S)
