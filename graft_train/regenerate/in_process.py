"""In process: our engine answers, with a batch that is refilled as prompts end."""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from graft_inference import GraftEngine, Policy, Request
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target
from graft_inference.target.packed_linear import pack_target
from graft_inference.target.self_check import self_check
from graft_train.config import Config
from graft_train.config.regenerate import RegenerateConfig
from graft_train.data.prompts import Prompt
from graft_train.data.samples import Sample, answered, keep_lines, read_lines, to_line
from graft_train.data.target import load_target
from graft_train.regenerate.capture import CapturingTarget, StateShards, captured_settings


def answer_in_process(prompts: list[Prompt], path: Path, config: Config, end_ids: set[int]) -> None:
    """Appends the target's answer to every prompt that has none in `path` yet, in the order in which they end.

    Args:
        end_ids: an answer ends with the first of them.
    """
    model = load_target(config.target)
    layers: tuple[int, ...] = ()
    shards = None
    if config.regenerate.states:
        layers = tuple(captured_settings(config.head, config.target)["aux_layer_ids"])
        shards = StateShards(path.parent / "states", model, config.head)
    done = shards.resume(path) if shards else keep_whole_answers(path)
    pending = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.id not in done]
    if shards:
        shards.check_disk([prompt for _, prompt in pending], config.regenerate.max_new_tokens, len(layers))
    engine = plain_engine(model, layers, end_ids)
    with (
        path.open("ab") as file,
        tqdm(total=len(prompts), initial=len(done), desc="regenerate", unit="answer") as bar,
    ):
        waiting = []
        for sample, states_SE in answers(engine, pending, config.regenerate, config.seed):
            bar.update(1)
            waiting.append(sample)
            if states_SE is None or shards is None or shards.add(sample, states_SE):
                _append(file, waiting)
                waiting = []
        if shards:
            shards.flush()
            _append(file, waiting)
            shards.finish(config.target, path, layers)


def _append(file: BinaryIO, samples: list[Sample]) -> None:
    """Flushed, lines outlive this process; should the machine fail, what is lost is answered again."""
    file.write(b"".join(map(to_line, samples)))
    file.flush()


def plain_engine(model: Any, aux_layer_ids: tuple[int, ...], end_ids: set[int]) -> GraftEngine:
    """An engine that decodes token by token and has no head.

    Raises:
        GraftError: a family that the engine cannot serve, which no head could be trained for either.
    """
    target = CapturingTarget(model, aux_layer_ids) if aux_layer_ids else Target(model, aux_layer_ids)
    self_check(target)
    if not target.is_split:
        pack_target(target)
    nothing = SuccessorMatrix.empty(1, 1, target.device)
    policy = Policy(AUTOREGRESSIVE, AUTOREGRESSIVE, AUTOREGRESSIVE)
    return GraftEngine(target, policy, None, nothing, sorted(end_ids), captured=False)


def answers(
    engine: GraftEngine, pending: list[tuple[int, Prompt]], settings: RegenerateConfig, seed: int
) -> Iterator[tuple[Sample, torch.Tensor | None]]:
    """The target's answers to numbered prompts, in the order in which they end.

    A prompt's temperature and seed follow from its number: whenever it is answered, and beside whichever others, its
    answer is the same.

    Returns:
        Of each, the sample and the states of its tokens, where the target has aux layers.
    """
    drawn: list[dict[str, Any]] = [
        {
            "temperature": settings.temperatures[number % len(settings.temperatures)],
            "seed": seed + number,
            "max_new_tokens": settings.max_new_tokens,
        }
        for number, _ in pending
    ]
    requests = (
        (torch.tensor(prompt.ids), Request(method="autoregressive", **one))
        for (_, prompt), one in zip(pending, drawn, strict=True)
    )
    for one in engine.run_many(requests, settings.batch, keep_aux=bool(engine.target.aux_layer_ids)):
        prompt = pending[one.number][1]
        yield answered(prompt.id, prompt.ids, one.tokens, drawn[one.number]), one.aux_SE


def keep_whole_answers(path: Path) -> set[str]:
    """Cuts a line that a kill left torn, and the prompts behind the answers.

    Returns:
        Ids of the answered prompts.
    """
    kept = [sample.id for sample in takewhile(lambda sample: sample.split == "train", read_lines(path))]
    keep_lines(path, len(kept))
    return set(kept)


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end-of-sequence token; what follows is padding."""
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids
