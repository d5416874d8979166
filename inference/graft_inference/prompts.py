"""What a caller passes as prompts, and the sequences that come back."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import GraftError

NO_PAD_TOKEN = "the shorter sequences of a batch are filled up, but no pad token is known: pass pad_token_id="


@dataclass
class Prompts:
    """One prompt, or a batch of them of unequal lengths.

    Attributes:
        prompts: each prompt without its padding, [S_i] int64.
        padded_BS: the prompts as they came; those of a list are padded on the left.
        pad_token_id: fills up shorter sequences; not needed for one prompt.
    """

    prompts: list[Tensor]
    padded_BS: Tensor
    pad_token_id: int | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        eos_token_ids: Set[int] = frozenset(),
    ) -> Self:
        """Takes the padding off.

        Args:
            input_ids: [S], [B, S], or B prompts of [S_i].
            attention_mask: [B, S], 1 for tokens and 0 for padding, which stands on the left or the right.
            pad_token_id: None: not known.
            eos_token_ids: a pad token that is one of these may be a prompt's own.

        Raises:
            GraftError: no prompt, an empty one, a mask with holes, padding without a mask, or a list to be padded
                without a pad token.
        """
        if isinstance(input_ids, Tensor):
            padded_BS = input_ids[None] if input_ids.dim() == 1 else input_ids
            if padded_BS.dim() != 2 or padded_BS.numel() == 0:
                raise GraftError(
                    f"input_ids of shape {list(input_ids.shape)}: pass one non-empty prompt, [length] or [1, length], "
                    "or a batch, [prompts, length]"
                )
            if attention_mask is not None:
                prompts = _unpadded(padded_BS, attention_mask)
            else:
                prompts = list(padded_BS)
                if len(prompts) > 1 and pad_token_id is not None and pad_token_id not in eos_token_ids:
                    _refuse_padding(padded_BS, pad_token_id)
        else:
            if attention_mask is not None:
                raise GraftError("a list of prompts has no padding: pass it without attention_mask")
            prompts = [_line(torch.as_tensor(ids), index) for index, ids in enumerate(input_ids)]
            if not prompts:
                raise GraftError("an empty list of prompts: pass one non-empty prompt at least")
            padded_BS = pad_sequence(prompts, batch_first=True, padding_value=pad_token_id or 0, padding_side="left")
            if pad_token_id is None and len({len(line) for line in prompts}) > 1:
                raise GraftError(NO_PAD_TOKEN)
        return cls(prompts, padded_BS, pad_token_id)

    def __len__(self) -> int:
        return len(self.prompts)

    def with_new(self, new: Sequence[Sequence[int]]) -> Tensor:
        """The prompts as they came and the new tokens of each, padded on the right, [B, S + longest new] int64."""
        lines = [torch.tensor(tokens, dtype=torch.long, device=self.padded_BS.device) for tokens in new]
        padded = pad_sequence(lines, batch_first=True, padding_value=self.pad_token_id or 0)
        return torch.cat((self.padded_BS, padded), dim=1)


def _line(ids: Tensor, index: int) -> Tensor:
    line = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if line.dim() != 1 or len(line) == 0:
        raise GraftError(f"prompt {index} of the list has shape {list(ids.shape)}: pass one non-empty line, [length]")
    return line


def _refuse_padding(padded_BS: Tensor, pad_token_id: int) -> None:
    for index, ends in enumerate(padded_BS[:, [0, -1]].tolist()):
        if pad_token_id in ends:
            raise GraftError(
                f"prompt {index} of the batch begins or ends with the pad token {pad_token_id}: pass attention_mask, "
                "or a list of prompts without padding"
            )


def _unpadded(padded_BS: Tensor, attention_mask: Tensor) -> list[Tensor]:
    if attention_mask.shape != padded_BS.shape:
        raise GraftError(
            f"attention_mask of shape {list(attention_mask.shape)} for input_ids of {list(padded_BS.shape)}: "
            "it says of every token whether it is one"
        )
    mask_BS = attention_mask.to(padded_BS.device).bool()
    firsts, counts = mask_BS.int().argmax(dim=1).tolist(), mask_BS.sum(dim=1).tolist()
    prompts = []
    for index, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        if count == 0:
            raise GraftError(f"attention_mask hides all of prompt {index}: leave empty prompts out")
        if not bool(mask_BS[index, first : first + count].all()):
            raise GraftError(f"attention_mask has holes in prompt {index}: only padding at an end can be hidden")
        prompts.append(padded_BS[index, first : first + count])
    return prompts
