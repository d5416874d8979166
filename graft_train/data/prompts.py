"""Prompts: what the target is asked to continue or to answer."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft_inference.errors import GraftError
from graft_train.data.documents import Document

# A window's tokens are found within this many characters each; longer tokens are hardly ever that long.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Prompt:
    id: str
    ids: list[int]


def build_prompts(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    prompt_tokens: int,
    max_tokens: int,
    seed: int,
) -> list[Prompt]:
    """Up to `count` prompts, spread over the documents in an order that only `seed` decides.

    Text gives windows of `prompt_tokens` tokens that start at a line's start and do not overlap;
    a conversation gives one prompt, the turns up to the last that is not the assistant's.

    Args:
        max_tokens: conversations whose prompt is longer are left out.

    Raises:
        GraftError: no prompt could be made, or a conversation meets a tokenizer without chat template.
    """
    candidates = [place for document in documents for place in _places(document, prompt_tokens)]
    random.Random(seed).shuffle(candidates)
    prompts: list[Prompt] = []
    for document, start in candidates:
        if len(prompts) == count:
            break
        if document.messages is not None:
            ids = _conversation_ids(document, tokenizer)
            usable = len(ids) <= max_tokens
        else:
            ids = _window_ids(document, start, tokenizer, prompt_tokens)
            usable = prompt_tokens // 2 < len(ids) <= max_tokens
        if usable:
            prompts.append(Prompt(f"{document.id}@{start}", ids))
    if not prompts:
        raise GraftError(
            f"none of {len(documents)} documents gives a prompt: texts are shorter than half of "
            f"data.prompt_tokens={prompt_tokens}, or prompts are longer than the {max_tokens} tokens the "
            "target can take; change data.prompt_tokens or the data"
        )
    return prompts


def _places(document: Document, prompt_tokens: int) -> Iterator[tuple[Document, int]]:
    """Where windows of a text start: line starts, far enough apart not to overlap. 0 for a conversation."""
    if document.text is None:
        yield document, 0
        return
    start, stride = 0, prompt_tokens * CHARACTERS_PER_TOKEN
    while start < len(document.text):
        yield document, start
        newline = document.text.find("\n", start + stride - 1)
        start = newline + 1 if newline >= 0 else len(document.text)


def _window_ids(document: Document, start: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> list[int]:
    assert document.text is not None
    window = document.text[start : start + prompt_tokens * CHARACTERS_PER_TOKEN]
    return tokenizer(window).input_ids[:prompt_tokens]


def _conversation_ids(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    assert document.messages is not None
    if tokenizer.chat_template is None:
        raise GraftError(
            f"document {document.id} is a conversation, but the target's tokenizer has no chat template; "
            "use an instruction-tuned target, or records with the field text"
        )
    asked = max(i for i, message in enumerate(document.messages) if message["role"] != "assistant")
    turns = list(document.messages[: asked + 1])
    encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])
