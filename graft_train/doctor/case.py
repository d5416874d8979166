"""What is examined: a run's stages or a bundle, as far as they are there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from graft_inference import GraftError, Policy
from graft_inference.bundle import (
    check_plans,
    check_tokenizer,
    describe_target,
    load_bundle,
    load_successors,
    load_target_model,
    recorded_target,
    served_dtype,
)
from graft_inference.bundle import resolve as resolve_bundle
from graft_inference.files import read_json
from graft_inference.heads.families import Head, check_head, is_block, load_any_head
from graft_inference.request import ends_of
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_train.data.samples import Sample, read_lines, read_samples
from graft_train.distill.batches import hold_out, with_room
from graft_train.stage import RECORD

SAMPLES, LONGEST = 12, 2048
"""Answers of each kind that are read, and tokens of prompt and answer: some thousand positions, which tell shares to
within three points."""


@dataclass(frozen=True)
class DoctorOptions:
    """The options of the command, see its help."""

    place: str
    target: str | None = None
    prompts: str | None = None
    template_variable: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    as_json: bool = False


@dataclass
class Case:
    """A head, its target, and what is known of how it came to be.

    Attributes:
        policy: None where none was learned.
        trained: answers that the head was trained on; None where they are not there.
        held_out: answers that it was not trained on.
        asked: prompts that have no answer yet.
        known: what `training.json` says of the training; empty where there is none.
        ends: tokens at which the target stops.
    """

    model: PreTrainedModel
    tokenizer: Any
    target: str
    head: Head
    policy: Policy | None
    successors: SuccessorMatrix
    ends: frozenset[int]
    trained: list[Sample] | None = None
    held_out: list[Sample] = field(default_factory=list)
    asked: list[Sample] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)


def open_case(options: DoctorOptions) -> Case:
    """Reads all there is, and loads the target.

    Raises:
        GraftError: neither a run with a head nor a bundle, a target that cannot be loaded or is another one's, or
            files that are damaged.
    """
    place = _place(options.place)
    served = place if (place / "config.json").is_file() else None
    if served is None and not (place / "head").is_dir():
        served = place / "bundle"
        if not served.is_dir():
            raise GraftError(
                f"{options.place} is neither a bundle nor a run with a head (no config.json, head/ or bundle/): run "
                "graft distill or graft adopt with the same run_dir first"
            )
    name = options.target or _recorded(place)
    is_block(served or place / "head")  # refuses what is no head before the target is loaded, which may take minutes
    bundle = place / "bundle" if (place / "bundle").is_dir() else place
    model, tokenizer = load_target_model(name, options.device, served_dtype(bundle, options.device, options.dtype))
    check_tokenizer(tokenizer, name)
    config = model.config.get_text_config()
    ends = frozenset(ends_of(model.generation_config.eos_token_id, tokenizer))
    model.generation_config = GenerationConfig()  # a checkpoint's penalties are not its law
    if served is not None:
        loaded = load_bundle(served, config, tokenizer)
        assert loaded.head is not None
        policy = loaded.policy if (served / "graft.json").exists() else None
        case = Case(model, tokenizer, name, loaded.head, policy, loaded.successors, ends)
    else:
        head = load_any_head(place / "head", config.num_hidden_layers)
        check_head(head.config, config)
        successors = _successors(place / "corpus", name, config, tokenizer)
        case = Case(model, tokenizer, name, head, _policy(place / "policy", head, successors), successors, ends)
    _add_data(case, place)
    return case


def _place(given: str) -> Path:
    path = Path(given).expanduser()
    return path if path.is_dir() else resolve_bundle(given)


def _recorded(place: Path) -> str:
    """The target that a run has within, or that a bundle names."""
    if (place / "target" / "config.json").is_file():
        return str(place / "target")
    for bundle in (place, place / "bundle"):
        if (bundle / "graft.json").exists():
            return recorded_target(bundle)
    raise GraftError(f"{place} does not say which target it was made for: pass --target")


def _successors(corpus: Path, name: str, config: Any, tokenizer: Any) -> SuccessorMatrix:
    """The run's matrix, which also knows the tokenizer that it was counted with; an empty one where there is none."""
    if not corpus.is_dir():
        return SuccessorMatrix.empty(config.vocab_size, 1, torch.device("cpu"))
    made_for = describe_target(name, config, tokenizer)
    del made_for["name_or_path"]  # it may lie elsewhere by now
    return load_successors(corpus / "successors.safetensors", config.vocab_size, made_for)


def _policy(directory: Path, head: Head, successors: SuccessorMatrix) -> Policy | None:
    if not (directory / "policy.json").is_file():
        return None
    policy = Policy.from_dict(read_json(directory / "policy.json", "run graft calibrate again"))
    check_plans(policy, head.config, successors)
    return policy


def _add_data(case: Case, place: Path) -> None:
    """The run's answers, parted as `distill` parted them, and its held-out prompts."""
    path, head = place / "data" / "samples.jsonl", place / "head"
    if not path.parent.is_dir():
        return
    answers = read_samples(path, "train")
    asked = [sample for sample in read_lines(path) if sample.split == "evaluation"]
    _check_known([*answers, *asked], case.model.config.get_text_config().vocab_size)
    case.asked = spread(asked)
    record = read_json(head / RECORD, "run its stage again") if (head / RECORD).is_file() else {}
    if record.get("stage") != "distill":  # then it has learned elsewhere, from other answers
        case.held_out = spread(answers)
        return
    try:
        settings, seed = record["settings"]["head"], record["settings"]["seed"]
        longest, most = int(settings["max_length"]), int(settings["validation_samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise GraftError(f"{head / RECORD} does not say how the head was trained ({error!r}): train it again") from None
    answers = with_room(answers, longest)
    held_out, chosen = hold_out(answers, min(most, len(answers) // 10), seed)
    case.trained = spread([answers[number] for number in chosen])
    case.held_out = spread([answers[number] for number in held_out])
    known = head / "training.json"
    case.known = read_json(known, "run graft distill again") if known.is_file() else {}


def _check_known(samples: list[Sample], vocab_size: int) -> None:
    """Raises GraftError for a token that the target has no embedding for."""
    for sample in samples:
        if max(sample.ids) >= vocab_size:
            raise GraftError(
                f"sample {sample.id} holds token {max(sample.ids)}, but the target has {vocab_size} tokens: it is not "
                "the one that these answers were made with"
            )


def spread(samples: list[Sample]) -> list[Sample]:
    """Some of them, evenly from first to last, each at most `LONGEST` tokens."""
    count = min(SAMPLES, len(samples))
    chosen = [samples[place * len(samples) // count] for place in range(count)]
    # A prompt without an answer cannot be cut: another one would be asked then.
    return [kept for sample in chosen if (kept := sample.cut(LONGEST)) is not None]
