"""`regenerate`: the target answers the training prompts itself, so that the head learns its habits."""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from graft_inference import GraftError
from graft_inference.files import replace_file
from graft_inference.request import ends_of
from graft_inference.target.model import max_positions
from graft_train.arithmetic import with_dtype
from graft_train.config import Config
from graft_train.config.regenerate import RegenerateConfig
from graft_train.data.chat import Chat
from graft_train.data.documents import of_split, read_documents
from graft_train.data.preview import show
from graft_train.data.prompts import (
    Prompt,
    answered_samples,
    build_prompts,
    prompt_settings,
    refuse_changed,
    room_for_prompts,
)
from graft_train.data.samples import Sample, append_samples, parse_sample, to_line
from graft_train.data.target import load_tokenizer, resolve_device, target_path, text_config, whole_config
from graft_train.processes import say
from graft_train.regenerate.capture import captured_settings
from graft_train.regenerate.in_process import answer_in_process
from graft_train.regenerate.static_batches import answer_in_static_batches
from graft_train.stage import run_stage

__all__ = ["RegenerateConfig", "regenerate"]
PREVIEWED = 256
"""Samples whose share of trained tokens is shown."""


def regenerate(config: Config) -> Path:
    """Writes `data/samples.jsonl`, see `data/samples.py` for a line's fields, and with states=true `data/states`.

    Raises:
        GraftError: launched as several processes, or what a stage, the data or a server lacks.
        SystemExit: data.preview=true, when the samples have been shown. Nothing is written then.
    """
    if config.data.preview:
        _preview(config)
        raise SystemExit(0)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GraftError(
            "regenerate runs as one process: graft regenerate; to answer faster give it servers (regenerate.base_url)"
        )
    settings = {
        **config.regenerate.decisive(),
        **prompt_settings(config.data),
        "seed": config.seed,
    }
    if config.regenerate.states:
        settings["states"] = captured_settings(config.head, config.target)
    return run_stage(config, "regenerate", "data", settings, ["target"], lambda out: _build(config, out, settings))


def _build(config: Config, out: Path, recorded: dict[str, Any]) -> None:
    settings, path = config.regenerate, out / "samples.jsonl"
    work = _Work(config)
    held_out = [
        Sample(prompt.id, split, prompt.ids)
        for split in ("calibration", "evaluation")
        for prompt in work.prompts(split, settings.held_out)
    ]
    if settings.answers == "data":
        # Aside and whole: a bad record may be followed by other settings.
        replace_file(path, lambda aside: _write_answered(aside, work.answered(settings.samples)))
    elif settings.servers():
        from graft_train.regenerate.servers import ask_servers  # here, as without servers no client is needed

        ask_servers(work.prompts("train", settings.samples), path, settings, config.seed, work.chat)
    elif settings.states or resolve_device(config.target.device).type == "cpu":
        answer_in_process(work.prompts("train", settings.samples), path, with_dtype(config), work.chat.end_ids)
    else:
        answer_in_static_batches(work.prompts("train", settings.samples), path, with_dtype(config), work.chat.end_ids)
    refuse_changed(config.data, recorded, out)
    with path.open("ab") as file:
        append_samples(file, held_out)


def _write_answered(path: Path, samples: Iterator[Sample]) -> None:
    with path.open("wb") as file:
        for sample in tqdm(samples, desc="regenerate", unit="sample"):
            file.write(to_line(sample))


class _Work:
    """Documents, template and limits, read once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        path, settings, target_config = target_path(config.target), config.regenerate, text_config(config.target)
        tokenizer = load_tokenizer(config.target)
        ends = end_ids(path, tokenizer)
        self.chat = Chat(tokenizer, ends, config.data.chat_template_kwargs, target_config.vocab_size)
        self.max_positions = max_positions(target_config)
        if urls := settings.servers():
            from graft_train.servers import context_limit

            self.max_positions = min(self.max_positions, context_limit(urls) or self.max_positions)
        room = room_for_prompts(self.max_positions, settings.max_new_tokens, "regenerate.max_new_tokens")
        self.room = min(room, settings.max_prompt_tokens)
        self.documents = read_documents(config.data)

    def prompts(self, split: str, count: int) -> list[Prompt]:
        """Prompts of a split; an answer must fit behind each."""
        return self._make(build_prompts, split, count, self.room)

    def answered(self, count: int) -> Iterator[Sample]:
        return self._make(answered_samples, "train", count, self.max_positions)

    def _make(self, make: Callable[..., Any], split: str, count: int, max_tokens: int) -> Any:
        documents = of_split(self.documents, split, self.config.data)
        return make(documents, self.chat, self.config.data, count=count, max_tokens=max_tokens, seed=self.config.seed)


def end_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which the target in this directory stops, told without loading its weights."""
    try:
        of_model = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # it has no such file
        of_model = whole_config(path).get_text_config().eos_token_id
    return ends_of(of_model, tokenizer)


def _preview(config: Config) -> None:
    """Shows what there is: samples of a finished or interrupted run, the data's own answers, or prompts."""
    tokenizer, run = load_tokenizer(config.target), Path(config.run_dir)
    for path in (run / "data" / "samples.jsonl", run / "data.partial" / "samples.jsonl"):
        if path.is_file() and (samples := list(islice(_trained(path), PREVIEWED))):
            say(f"{path}:")
            show(samples, tokenizer)
            return
    work = _Work(config)
    if config.regenerate.answers == "data":
        show(list(work.answered(PREVIEWED)), tokenizer)
        return
    show([Sample(prompt.id, "train", prompt.ids) for prompt in work.prompts("train", PREVIEWED)], tokenizer)
    say("these are prompts; what the target answers them, once regenerate has run, is trained on")


def _trained(path: Path) -> Iterator[Sample]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n") and (sample := parse_sample(line, f"{path}, line {number}")).split == "train":
                yield sample
