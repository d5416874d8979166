"""The end of the quickstart: one answer of the target, sped up by the bundle and coloured by `graft chat`'s colours."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from graft_inference import GenerationStats, GraftEngine
from graft_train.chat import coloured, plain, show_tokens
from graft_train.config import Config
from graft_train.data.samples import read_samples
from graft_train.evaluate.timing import new_engine

TOKENS = 160
"""Most of an answer."""


def demonstrate(config: Config) -> None:
    """Prints the shortest of the run's held-out prompts, and what the target answers."""
    engine, console = new_engine(config, config.target.dtype, config.evaluation.fallback), Console()
    held_out = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "evaluation")
    show_answer(engine, torch.tensor(min((sample.prompt_ids for sample in held_out), key=len)), console)
    console.print(Text(f"to go on: graft chat {config.run_dir}/bundle", "dim"))


def show_answer(engine: GraftEngine, prompt_S: Tensor, console: Console) -> None:
    """Prints a prompt and its answer as `graft chat` does.

    Args:
        engine: with a tokenizer.
        prompt_S: token ids.
    """
    tokenizer: Any = engine.tokenizer
    console.print(Text(tokenizer.decode(prompt_S, skip_special_tokens=True).strip(), "dim"))
    stats, room = GenerationStats(), engine.target.max_positions - len(prompt_S)
    tokens = engine.stream(prompt_S, min(TOKENS, room), stats=stats)
    show_tokens(tokens, tokenizer, stats, coloured(console) if console.is_terminal else plain)
