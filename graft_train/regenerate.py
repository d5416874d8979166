"""`regenerate`: the target answers the training prompts itself, so that the head learns its habits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from graft_train.data.documents import SPLITS, document_settings, of_split, read_documents
from graft_train.data.prompts import Prompt, build_prompts
from graft_train.data.samples import Sample, append_samples, parse_sample
from graft_train.data.target import load_target, load_tokenizer, target_path
from graft_train.stage import run_stage

if TYPE_CHECKING:
    from graft_train.config import Config


@dataclass(slots=True, kw_only=True)
class RegenerateConfig:
    """Attributes:
    samples: answers generated; fewer where the data has fewer prompts.
    held_out: prompts kept for calibration, and as many for evaluation.
    max_new_tokens: longest answer.
    batch: prompts answered at a time.
    temperatures: dealt out to the batches in turn; 0 is greedy.
    """

    samples: int = 50_000
    held_out: int = 200
    max_new_tokens: int = 1024
    batch: int = 32
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.8])


def regenerate(config: "Config") -> Path:
    """Writes `data/samples.jsonl`; see `data/samples.py` for a line's fields."""
    settings = {
        **asdict(config.regenerate),
        "data": document_settings(config.data),
        "prompt_tokens": config.data.prompt_tokens,
        "seed": config.seed,
    }
    return run_stage(config, "regenerate", "data", settings, [target_path(config)], lambda out: _build(config, out))


def _build(config: "Config", out: Path) -> None:
    model, tokenizer = load_target(config), load_tokenizer(config)
    prompts = choose_prompts(config, tokenizer, model.config.get_text_config().max_position_embeddings)
    batches = list(_batches(prompts["train"], config.regenerate.batch))
    path = out / "samples.jsonl"
    done = drop_torn_batch(path, [len(batch) for batch in batches])
    finished = sum(map(len, batches[:done]))
    with (
        path.open("ab") as file,
        tqdm(total=len(prompts["train"]), initial=finished, desc="regenerate", unit="answer") as bar,
    ):
        for number, batch in enumerate(batches[done:], start=done):
            append_samples(file, answer(model, tokenizer, batch, number, config))
            bar.update(len(batch))
        for split in ("calibration", "evaluation"):
            append_samples(
                file,
                [Sample(prompt.id, split, prompt.ids, [], 0.0, config.seed) for prompt in prompts[split]],
            )


def choose_prompts(config: "Config", tokenizer: Any, max_positions: int) -> dict[str, list[Prompt]]:
    """Prompts of each split; an answer must fit behind each.

    Raises:
        GraftError: a split without prompts.
    """
    settings = config.regenerate
    documents = read_documents(config.data)
    wanted = dict(zip(SPLITS, (settings.samples, settings.held_out, settings.held_out), strict=True))
    return {
        split: build_prompts(
            of_split(documents, split, config.data),
            tokenizer,
            count=count,
            prompt_tokens=config.data.prompt_tokens,
            max_tokens=max_positions - settings.max_new_tokens,
            seed=config.seed,
        )
        for split, count in wanted.items()
    }


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
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(b"".join(lines[:kept]))
    aside.replace(path)
    return done


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, batch: list[Prompt], number: int, config: "Config") -> list[Sample]:
    """The target's answers to one batch. Its seed follows from its number: a resumed run is the same."""
    settings = config.regenerate
    temperature = settings.temperatures[number % len(settings.temperatures)]
    seed = config.seed + number
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id
    length = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[pad] * (length - len(prompt.ids)) + prompt.ids for prompt in batch], device=model.device)
    mask = torch.tensor(
        [[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch], device=model.device
    )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    out = model.generate(ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, pad_token_id=pad, **sampling)
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or [])
    return [
        Sample(prompt.id, "train", prompt.ids, _until_end(row, ends), temperature, seed)
        for prompt, row in zip(batch, out[:, length:].tolist(), strict=True)
    ]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end-of-sequence token; what follows is padding."""
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids
