"""`adopt`: a published head as the head of this run, in place of one that `distill` trains."""

from pathlib import Path
from typing import Any

from graft_inference.errors import GraftError
from graft_inference.heads.families import drop_copies, possible_copies, save_any_head
from graft_train.config import Config
from graft_train.config.target import TargetConfig
from graft_train.data.target import load_target, text_config
from graft_train.processes import say
from graft_train.published import head_of, published_path
from graft_train.stage import fingerprint_of, run_stage


def adopt(config: Config) -> Path:
    """Writes `head/`: the head that `head.init_from` names, with its own numbers, in the dialect that `distill` writes.

    `stage.json` there says what was adopted: the place, the commit where that is a Hub id, and a fingerprint of the
    files. Embeddings and an lm_head that are its target's are left out. Nothing is trained.

    Raises:
        GraftError: no head is named, none is there that can be read, it is another target's, or a checkpoint of this
            run's own training.
    """
    place = config.head.init_from
    if place is None:
        raise GraftError("head.init_from is not set: name the published head, a directory or a Hub id")
    path = published_path(place)
    training = Path(config.run_dir, "head.partial").resolve()
    if path.resolve().is_relative_to(training):
        raise GraftError(
            f"head.init_from={place} is of the training in {training}, and a run has one head: move the checkpoint "
            f"away, delete {training}, and adopt it from where it then is; or use another run_dir"
        )
    # A Hub id was downloaded to a directory that is named by its commit.
    commit = None if Path(place).expanduser().is_dir() else path.name
    settings = {"init_from": place, "commit": commit, "files": fingerprint_of(path)}
    return run_stage(config, "adopt", "head", settings, ["target"], lambda out: _build(config.target, place, path, out))


def _build(settings: TargetConfig, place: str, path: Path, out: Path) -> None:
    head = head_of(place, path, text_config(settings))
    if possible_copies(head):
        target: Any = load_target(settings)
        drop_copies(head, target.get_input_embeddings().weight, target.get_output_embeddings().weight)
    save_any_head(head, out)
    size = sum(parameter.numel() for parameter in head.parameters())
    say(
        f"adopt: {place}, a head of {size:,} parameters on layers {list(head.config.aux_layer_ids)}, "
        f"draft vocabulary {head.config.draft_vocab_size}"
    )
