"""What a caller passes as prompts, and the sequences that come back."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Self

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
        input_ids: Any,
        attention_mask: Any = None,
        pad_token_id: int | None = None,
        eos_token_ids: Set[int] = frozenset(),
    ) -> Self:
        """Reads prompts of any kind and takes the padding off.

        Args:
            input_ids: [S], [B, S], or a list of B prompts of [S_i], as tensors, arrays or lists of integers; or what a
                tokenizer returns, with its mask.
            attention_mask: as input_ids, 1 for tokens and 0 for padding, which stands on the left or the right.
            pad_token_id: None: not known.
            eos_token_ids: a pad token that is one of these may be a prompt's own.

        Raises:
            GraftError: no prompt, an empty one, one that is no token ids, a mask with holes, padding without a mask,
                or a list to be padded without a pad token.
        """
        if isinstance(input_ids, Mapping):
            input_ids, attention_mask = _of_tokenizer(input_ids, attention_mask)
        if isinstance(input_ids, list | tuple) and not _is_line(input_ids):
            return cls._listed(input_ids, attention_mask, pad_token_id)
        ids = _integers(input_ids)
        padded_BS = ids[None] if ids.dim() == 1 else ids
        if padded_BS.dim() != 2 or padded_BS.numel() == 0:
            raise GraftError(
                f"input_ids of shape {list(ids.shape)}: pass one non-empty prompt, [length] or [1, length], "
                "or a batch, [prompts, length]"
            )
        if attention_mask is not None:
            return cls(_unpadded(padded_BS, attention_mask), padded_BS, pad_token_id)
        if len(padded_BS) > 1 and pad_token_id is not None and pad_token_id not in eos_token_ids:
            _refuse_padding(padded_BS, pad_token_id)
        return cls(list(padded_BS), padded_BS, pad_token_id)

    @classmethod
    def _listed(cls, listed: Sequence[Any], masks: Any, pad_token_id: int | None) -> Self:
        prompts = [_line(_integers(ids), index) for index, ids in enumerate(listed)]
        if not prompts:
            raise GraftError("an empty list of prompts: pass one non-empty prompt at least")
        if masks is not None:
            if _lengths(masks) != [len(line) for line in prompts]:
                raise GraftError("attention_mask does not fit the list of prompts: pass it without attention_mask")
            prompts = [
                _unpadded(line[None], mask, n)[0] for n, (line, mask) in enumerate(zip(prompts, masks, strict=True))
            ]
        if pad_token_id is None and len({len(line) for line in prompts}) > 1:
            raise GraftError(NO_PAD_TOKEN)
        padded_BS = pad_sequence(prompts, batch_first=True, padding_value=pad_token_id or 0, padding_side="left")
        return cls(prompts, padded_BS, pad_token_id)

    def __len__(self) -> int:
        return len(self.prompts)

    def with_new(self, new: Sequence[Sequence[int]]) -> Tensor:
        """The prompts as they came and the new tokens of each, padded on the right, [B, S + longest new] int64."""
        lines = [torch.tensor(tokens, dtype=torch.long, device=self.padded_BS.device) for tokens in new]
        padded = pad_sequence(lines, batch_first=True, padding_value=self.pad_token_id or 0)
        return torch.cat((self.padded_BS, padded), dim=1)


def check_vocabulary(ids_S: Tensor, vocab_size: int, tokenizer: Any | None, index: int) -> None:
    """Raises GraftError, which names the first token of prompt `index` that the target has no embedding for."""
    wrong = ids_S[(ids_S < 0) | (ids_S >= vocab_size)][:1].tolist()
    if wrong:
        named = tokenizer is not None and 0 <= wrong[0] < len(tokenizer) and tokenizer.convert_ids_to_tokens(wrong[0])
        name = f" ({named!r})" if named else ""
        raise GraftError(
            f"prompt {index} has the token {wrong[0]}{name} outside the vocabulary of {vocab_size}: the target has no "
            "embedding for it; leave it out, or use the tokenizer that belongs to the target"
        )


def _of_tokenizer(encoded: Mapping[str, Any], attention_mask: Any) -> tuple[Any, Any]:
    """Ids and mask of what a tokenizer returns. Raises GraftError for anything beside them that a target would see."""
    others = sorted(encoded.keys() - {"input_ids", "attention_mask", "token_type_ids"})
    if others or "input_ids" not in encoded:
        raise GraftError(
            f"a prompt with {', '.join(others) or 'no input_ids'}: pass input_ids and attention_mask alone"
        )
    if attention_mask is not None and "attention_mask" in encoded:
        raise GraftError("two attention masks: pass the one beside the input_ids, or the other")
    return encoded["input_ids"], encoded.get("attention_mask", attention_mask)


def _is_line(values: Sequence[Any]) -> bool:
    """Whether these are token ids, and not prompts."""
    return len(values) > 0 and hasattr(values[0], "__index__") and not hasattr(values[0], "__len__")


def _integers(values: Any) -> Tensor:
    """Token ids as int64."""
    ids = _tensor(values, "a prompt")
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise GraftError(f"a prompt is token ids, not {ids.dtype}: pass integers, such as tokenizer(text).input_ids")
    return ids.long()


def _tensor(values: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GraftError(
            f"{name} of type {type(values).__name__} holds no integers ({error}): pass tokenizer(text)"
        ) from error
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        raise GraftError(f"{name} is a meta, nested or sparse tensor: pass a dense one, [prompts, length]")
    return tensor


def _lengths(masks: Any) -> list[int] | None:
    """Of each mask; None where these are no masks."""
    try:
        return [len(mask) for mask in masks]
    except TypeError:
        return None


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


def _unpadded(padded_BS: Tensor, attention_mask: Any, first_index: int = 0) -> list[Tensor]:
    mask_BS = _tensor(attention_mask, "attention_mask")
    mask_BS = mask_BS[None] if mask_BS.dim() == 1 else mask_BS
    if mask_BS.shape != padded_BS.shape:
        raise GraftError(
            f"attention_mask of shape {list(mask_BS.shape)} for input_ids of {list(padded_BS.shape)}: "
            "it says of every token whether it is one"
        )
    mask_BS = mask_BS.to(padded_BS.device).bool()
    firsts, counts = mask_BS.int().argmax(dim=1).tolist(), mask_BS.sum(dim=1).tolist()
    prompts = []
    for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        index = first_index + row
        if count == 0:
            raise GraftError(f"attention_mask hides all of prompt {index}: leave empty prompts out")
        if not bool(mask_BS[row, first : first + count].all()):
            raise GraftError(f"attention_mask has holes in prompt {index}: only padding at an end can be hidden")
        prompts.append(padded_BS[row, first : first + count])
    return prompts


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to be continued: with the tokenizer's start token, once, and without an end token."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded.input_ids), encoded.special_tokens_mask
    while ids and added[len(ids) - 1]:
        ids.pop()
    has_its_own = added[:2] == [1, 0] and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if has_its_own else ids


def check_text(text: str, what: str) -> None:
    """Raises GraftError for bytes that were no text when they were read, which Python keeps as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GraftError(f"{what} is no {error.encoding} text: {error}") from error


def is_plain(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the text of an answer, which has no special tokens, says all of it but how it ends.

    It does not where a model speaks in channels or calls tools, and what stands in them would run together.
    """
    whole, text = (
        tokenizer.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False) for skips in (False, True)
    )
    return bool(whole.startswith(text))
