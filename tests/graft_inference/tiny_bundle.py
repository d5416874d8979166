"""A tiny target and its bundle on disk, as export writes them (without custom_generate and card)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft_inference.bundle import describe_target
from graft_inference.heads.eagle3.checkpoint import save_head

from .tiny import VOCAB, tiny_head, tiny_model, tiny_policy

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def tiny_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """Byte-level with VOCAB tokens: letters, digits, Ġ (space), Ċ (newline), the bytes of é, and pairs."""
    characters = [*LETTERS, "Ġ", "Ċ", "Ã", "©"]
    pairs = [(a, b) for a in "aeiou" for b in "nrstl"][: VOCAB - len(characters)]
    tokens = [*characters, *(first + second for first, second in pairs)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if extra:
        vocabulary[extra] = vocabulary.pop("9")
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=extra or "0")


def tiny_successors(vocab_size: int = VOCAB, k: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "ids": torch.rand(vocab_size, vocab_size, generator=generator).argsort(dim=1)[:, :k].to(torch.int32),
        "probs": torch.full((vocab_size, k), 1 / k, dtype=torch.float16),
        "counts": torch.ones(vocab_size, dtype=torch.long),
    }


def write_target(directory: Path, family: str = "llama", **overrides) -> Path:
    tiny_model(family, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def write_bundle(directory: Path, target: Path, family: str = "llama") -> Path:
    """The bundle of the target that `write_target` wrote."""
    model = tiny_model(family)
    save_head(tiny_head(model), directory)
    made_for = describe_target(str(target), model.config, tiny_tokenizer())
    graft = {"policy": tiny_policy().to_dict(), "target": made_for}
    (directory / "graft.json").write_text(json.dumps(graft))
    save_file(tiny_successors(), directory / "successors.safetensors")
    return directory
