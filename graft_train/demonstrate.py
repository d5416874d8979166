"""The end of the quickstart: one answer of the target, sped up by the bundle and coloured by `graft chat`'s colours."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from graft_inference import GenerationStats
from graft_train.chat import coloured, plain, show_tokens
from graft_train.config import Config
from graft_train.data.samples import read_samples
from graft_train.evaluate.timing import new_engine

TOKENS = 160
"""Most of the answer."""


def demonstrate(config: Config) -> None:
    """Prints the shortest of the run's held-out prompts, and what the target answers."""
    engine, console = new_engine(config, config.target.dtype, config.evaluation.fallback), Console()
    tokenizer: Any = engine.tokenizer
    held_out = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "evaluation")
    prompt = min((sample.prompt_ids for sample in held_out), key=len)
    console.print(Text(tokenizer.decode(prompt, skip_special_tokens=True).strip(), "dim"))
    stats, room = GenerationStats(), engine.target.max_positions - len(prompt)
    tokens = engine.stream(torch.tensor(prompt), min(TOKENS, room), stats=stats)
    show_tokens(tokens, tokenizer, stats, coloured(console) if console.is_terminal else plain)
    console.print(Text(f"to go on: graft chat {config.run_dir}/bundle", "dim"))
