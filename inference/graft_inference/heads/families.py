"""The families of heads that can be served: how each is recognised, loaded, saved and run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GraftError
from ..files import read_json
from ..proposer import HeadProposer
from .block.checkpoint import load_block_config, load_block_head, save_block_head
from .block.config import BlockHeadConfig
from .block.dialects import sees_as_in_speculators
from .block.drafter import BlockProposer
from .block.keys import ARCHITECTURES, TYPES
from .block.model import BlockHead
from .checkpoint import CONFIG_FILE, REMEDY, SPECULATORS, Verifier
from .eagle3.checkpoint import load_head, load_head_config, save_head
from .eagle3.drafter import Eagle3Proposer
from .eagle3.model import DraftHead, DraftHeadConfig

Head = DraftHead | BlockHead
HeadConfig = DraftHeadConfig | BlockHeadConfig

OTHERS = {
    "dflash2": "DFlash 2, whose convolutions and candidate selector",
    "domino": "Domino, whose recurrent pass over the drafts",
    "lilicorr": "LiLiCorr, whose correction of the drafts",
    "xpress": "XPress, whose refiner of the drafts",
    "peagle": "P-EAGLE, whose learned state in place of the target's",
    "mtp": "multi-token prediction, whose layers of the target's kind",
    "medusa": "Medusa, whose heads without attention",
}
"""Families that others have and that are not computed here: how their names read without signs, and what is lacking."""


def is_block(directory: Path) -> bool:
    """Whether a head's configuration is that of a block head; any other is read as EAGLE-3's.

    Raises:
        GraftError: no configuration that can be read, or one of a family that is known and not computed here.
    """
    values = read_json(Path(directory) / CONFIG_FILE, REMEDY)
    values = values if isinstance(values, dict) else {}
    kind, architectures = values.get(SPECULATORS), values.get("architectures")
    names = list(map(str, architectures if isinstance(architectures, list) else []))
    _refuse_others(directory, [str(kind), *names])
    return bool(set(ARCHITECTURES) & set(names)) if kind is None else kind in TYPES


def _refuse_others(directory: Path, names: list[str]) -> None:
    for name in names:
        for mark, family in OTHERS.items():
            if mark in name.lower().replace("_", "").replace("-", ""):
                raise GraftError(
                    f"{directory}: {name} is {family} cannot be computed here: take an EAGLE-3, DFlash or DSpark head"
                )


def load_any_config(directory: Path, target_layers: int | None = None) -> HeadConfig:
    """The shape of a head of any family; see `load_any_head`."""
    load = load_block_config if is_block(directory) else load_head_config
    return load(directory, target_layers)


def load_any_head(directory: Path, target_layers: int | None = None) -> Head:
    """Reads a head of any family strictly, in the dtype it was saved in, on the CPU.

    Args:
        target_layers: layers of its target, from which follows what some dialects do not say.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the files do not describe one head.
    """
    load = load_block_head if is_block(directory) else load_head
    return load(directory, target_layers)


def save_any_head(head: Head, directory: Path, verifier: Verifier | None = None) -> None:
    """Writes a head's two files, in its own dtype; other files in `directory` stay.

    Args:
        verifier: the target, where its name is known: `vllm serve` then serves it by the head alone.
    """
    if isinstance(head, BlockHead):
        save_block_head(head, directory, verifier=verifier)
    else:
        save_head(head, directory, verifier)


def can_name_target(head: HeadConfig) -> bool:
    """Whether a checkpoint of this head says which target it is for, where that is known."""
    return not isinstance(head, BlockHeadConfig) or sees_as_in_speculators(head)


def check_head(head: HeadConfig, target: Any) -> None:
    """Raises GraftError unless a head was made for a target of this shape.

    Args:
        target: its (text) configuration.
    """
    layers = target.num_hidden_layers
    wanted = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    if isinstance(head, BlockHeadConfig):
        wanted["num_target_layers"] = layers
    for name, value in wanted.items():
        if getattr(head, name) != value:
            raise GraftError(
                f"the head has {name}={getattr(head, name)}, but the target {value}: it is another target's"
            )
    if head.aux_layer_ids[-1] >= layers:
        raise GraftError(
            f"the head reads layers {list(head.aux_layer_ids)}, but the target has 0..{layers - 1}: it is another "
            "target's"
        )


def possible_copies(head: Head) -> list[str]:
    """Which of "embed_tokens" and "lm_head" the head stores although they may be copies of its target's."""
    whole = isinstance(head, BlockHead) and head.config.draft_vocab_size == head.config.vocab_size
    return [name for name in ("embed_tokens", *(["lm_head"] if whole else [])) if getattr(head, name) is not None]


def drop_copies(head: Head, embedding_VH: Tensor, lm_head_VH: Tensor) -> None:
    """Drops the head's embeddings and lm_head where they equal the target's, which are used in their place then.

    Args:
        embedding_VH, lm_head_VH: the target's, in its dtype, in which they are compared.
    """
    for name in possible_copies(head):
        theirs_VH = embedding_VH if name == "embed_tokens" else lm_head_VH
        if not theirs_VH.is_meta and torch.equal(getattr(head, name).weight.to(theirs_VH), theirs_VH):
            setattr(head, name, None)


def described(directory: Path) -> tuple[str, str]:
    """A tag, and a line for people: a head's family, and the dialect that its checkpoint is written in."""
    values = read_json(Path(directory) / CONFIG_FILE, REMEDY)
    if is_block(directory):
        return "dflash", f"blocks drafted in one pass, as `{values['architectures'][0]}`"
    if SPECULATORS in values and "eagle_config" not in values:
        return "eagle3", 'EAGLE-3, in vLLM\'s "speculators" dialect, which SGLang does not read'
    return "eagle3", "EAGLE-3, in the dialect that SGLang and vLLM read"


def most_steps(config: HeadConfig) -> int | None:
    """Draft steps that a head can run; None: any number."""
    return config.drafts if isinstance(config, BlockHeadConfig) else None


def proposer_of(
    head: Head, embed: Callable[[Tensor], Tensor], unembed: Callable[[Tensor], Tensor], max_positions: int
) -> HeadProposer:
    """The proposer that runs this head for all requests of an engine.

    Args:
        embed, unembed: the target's embeddings and lm_head.
        max_positions: of the target.
    """
    if isinstance(head, BlockHead):
        return BlockProposer(head, embed, unembed, max_positions)
    return Eagle3Proposer(head, embed, max_positions)
