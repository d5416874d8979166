"""Off the CPU: transformers answers batches of prompts of like length; all of a batch wait for its longest."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from graft_train.config import Config
from graft_train.config.regenerate import RegenerateConfig
from graft_train.data.prompts import Prompt
from graft_train.data.samples import Sample, answered, append_samples, parse_sample
from graft_train.data.target import load_target
from graft_train.regenerate.in_process import until_end

PAD = 0
"""Fills up shorter prompts, unseen. Every target has it, while a tokenizer's own may lack an embedding."""


def answer_in_static_batches(prompts: list[Prompt], path: Path, config: Config, end_ids: set[int]) -> None:
    """Appends the target's answers to `path`, whole batches at a time, from the first that is not there.

    Args:
        end_ids: an answer ends with the first of them.
    """
    model: Any = load_target(config.target)
    # A target's own generation settings would change its distribution, which the head is to learn.
    model.generation_config = GenerationConfig(eos_token_id=sorted(end_ids), pad_token_id=PAD)
    batches = list(_batches(prompts, config.regenerate.batch))
    done = drop_torn_batch(path, [len(batch) for batch in batches])
    finished = sum(map(len, batches[:done]))
    with (
        path.open("ab") as file,
        tqdm(total=len(prompts), initial=finished, desc="regenerate", unit="answer") as bar,
    ):
        for number, batch in enumerate(batches[done:], start=done):
            append_samples(file, answer(model, batch, number, config.regenerate, config.seed))
            bar.update(len(batch))


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together, fixed before anything is generated."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def drop_torn_batch(path: Path, sizes: list[int]) -> int:
    """Cuts what a kill left of an unfinished batch (or of the prompts behind the last one).

    Returns:
        Whole batches in the file.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    trained = sum(parse_sample(line, f"{path}, line {n}").split == "train" for n, line in enumerate(whole, start=1))
    done, kept = 0, 0
    while done < len(sizes) and kept + sizes[done] <= trained:
        kept += sizes[done]
        done += 1
    os.truncate(path, sum(map(len, lines[:kept])))
    return done


@torch.inference_mode()
def answer(model: Any, batch: list[Prompt], number: int, settings: RegenerateConfig, seed: int) -> list[Sample]:
    """The target's answers to one batch. Its seed follows from its number: a resumed run is the same."""
    temperature = settings.temperatures[number % len(settings.temperatures)]
    seed += number
    torch.manual_seed(seed)
    length = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[PAD] * (length - len(prompt.ids)) + prompt.ids for prompt in batch], device=model.device)
    mask = torch.tensor(
        [[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch], device=model.device
    )
    sampling: dict[str, Any] = {"do_sample": bool(temperature)}
    if temperature:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, **sampling)
    ends = set(model.generation_config.eos_token_id)
    drawn = {"temperature": temperature, "seed": seed, "max_new_tokens": settings.max_new_tokens}
    return [
        answered(prompt.id, prompt.ids, until_end(row, ends), drawn)
        for prompt, row in zip(batch, out[:, length:].tolist(), strict=True)
    ]
