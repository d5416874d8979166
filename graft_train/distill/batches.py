"""From samples to padded batches, each decided by its number alone, so that training resumes anywhere."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from graft_inference import GraftError
from graft_train.data.samples import Sample
from graft_train.data.states import TappedTarget, TargetStates
from graft_train.stage import say


@dataclass
class Row:
    """A sample as one sequence.

    Attributes:
        tokens_S: prompt and answer, or a conversation, int64.
        answer_S: bool, the tokens of the answer or answers, the end-of-sequence tokens included.
    """

    tokens_S: Tensor
    answer_S: Tensor


@dataclass
class Batch:
    """Rows padded on the right.

    Attributes:
        rows: which rows these are.
        answer_BS: bool, the tokens of the answers.
        first: the leftmost column in which a draft starts.
    """

    rows: list[int]
    tokens_BS: Tensor
    answer_BS: Tensor
    first: int

    @property
    def tokens(self) -> int:
        """Answer tokens."""
        return int(self.answer_BS.sum())


def to_rows(samples: list[Sample], max_length: int, vocab_size: int) -> list[Row]:
    """One row a sample; longer ones are cut (see `Sample.cut`), which is said.

    Raises:
        GraftError: names the sample that leaves nothing to train on, or holds a token the target lacks.
    """
    rows, cut = [], 0
    for sample in samples:
        kept = sample.cut(max_length)
        if kept is None:
            raise GraftError(
                f"the prompt of sample {sample.id} has {len(sample.prompt_ids)} tokens and fills "
                f"head.max_length={max_length}: nothing to train on; raise it or remove the sample"
            )
        if max(kept.ids) >= vocab_size:
            raise GraftError(
                f"sample {sample.id} holds token {max(kept.ids)}, but the target has {vocab_size} tokens: "
                "these answers were regenerated with another target"
            )
        cut += kept is not sample
        rows.append(Row(torch.tensor(kept.ids, dtype=torch.long), kept.answer_S))
    if cut:
        say(f"distill: {cut} of {len(samples)} samples are longer than head.max_length={max_length} and were cut")
    return rows


def plan_batches(rows: list[Row], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every batch of the training. Rows of like length share one; else the order is random."""
    plan = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(rows), generator=generator).tolist()
        batches = pack(rows, sorted(shuffled, key=lambda row: len(rows[row].tokens_S)), batch_tokens)
        plan += [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    return plan


def pack(rows: list[Row], order: list[int], batch_tokens: int) -> list[list[int]]:
    """Cuts rows ordered by length into batches of at most `batch_tokens` padded tokens, or of one row."""
    batches: list[list[int]] = []
    for row in order:
        if batches and len(rows[row].tokens_S) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows: list[Row], chosen: list[int], device: torch.device) -> Batch:
    tokens_BS = pad_sequence([rows[row].tokens_S for row in chosen], batch_first=True)
    answer_BS = pad_sequence([rows[row].answer_S for row in chosen], batch_first=True)
    first = max(int(answer_BS.any(dim=0).nonzero()[0]) - 1, 0)
    return Batch(chosen, tokens_BS.to(device), answer_BS.to(device), first)


StateSource = Callable[[Batch], TargetStates]


def cached_states(target: TappedTarget, rows: list[Row], batch_tokens: int) -> StateSource:
    """Runs the target once over all rows and keeps what it made of them in host memory.

    The batches of this pass are fixed, so that the states are the same to the bit when training resumes.
    """
    device = target.model.device
    cache: dict[int, TargetStates] = {}
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens_S))
    for chosen in pack(rows, by_length, batch_tokens):
        states = target.states(collate(rows, chosen, device).tokens_BS).to(torch.device("cpu"))
        for place, row in enumerate(chosen):
            end = len(rows[row].tokens_S)
            # Cloned, for a view would keep the whole batch with its padding alive.
            cache[row] = TargetStates(
                states.taps_BSE[place, :end].clone(),
                states.final_BSH[place, :end].clone(),
                states.choice_BS[place, :end].clone(),
            )

    def look_up(batch: Batch) -> TargetStates:
        found = [cache[row] for row in batch.rows]
        return TargetStates(
            pad_sequence([states.taps_BSE for states in found], batch_first=True),
            pad_sequence([states.final_BSH for states in found], batch_first=True),
            pad_sequence([states.choice_BS for states in found], batch_first=True),
        ).to(device)

    return look_up


def online_states(target: TappedTarget) -> StateSource:
    """Runs the target over every batch."""
    return lambda batch: target.states(batch.tokens_BS)
