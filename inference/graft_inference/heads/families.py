"""The families of heads that can be served: how each is told, read, and asked."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..files import read_json
from ..proposer import HeadProposer
from .block.checkpoint import DFLASH, DSPARK, load_block_config, load_block_head
from .block.config import BlockHeadConfig
from .block.drafter import BlockProposer
from .block.model import BlockHead
from .checkpoint import CONFIG_FILE, REMEDY, SPECULATORS
from .eagle3.checkpoint import load_head, load_head_config
from .eagle3.drafter import Eagle3Proposer
from .eagle3.model import DraftHead, DraftHeadConfig

Head = DraftHead | BlockHead
HeadConfig = DraftHeadConfig | BlockHeadConfig


def is_block(directory: Path) -> bool:
    """Whether a head's configuration is that of a block head; any other is read as EAGLE-3's.

    Raises:
        GraftError: no configuration that can be read.
    """
    values = read_json(Path(directory) / CONFIG_FILE, REMEDY)
    architectures = values.get("architectures") if isinstance(values, dict) else None
    return isinstance(architectures, list) and bool({DFLASH, DSPARK} & set(map(str, architectures)))


def load_any_config(directory: Path, target_layers: int | None = None) -> HeadConfig:
    """The shape of a head of any family; see `load_any_head`."""
    return load_block_config(directory) if is_block(directory) else load_head_config(directory, target_layers)


def load_any_head(directory: Path, target_layers: int | None = None) -> Head:
    """Reads a head of any family strictly, in the dtype it was saved in, on the CPU.

    Args:
        target_layers: layers of its target, from which follows what an EAGLE-3 head reads that does not say so.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the files do not describe one head.
    """
    return load_block_head(directory) if is_block(directory) else load_head(directory, target_layers)


def described(directory: Path) -> tuple[str, str]:
    """A tag and a sentence for people: the family of a head, and in whose dialect its checkpoint is."""
    values = read_json(Path(directory) / CONFIG_FILE, REMEDY)
    if is_block(directory):
        return "dflash", f"blocks drafted in one pass, as `{values['architectures'][0]}`"
    if SPECULATORS in values:
        return "eagle3", 'EAGLE-3, in vLLM\'s "speculators" dialect, which SGLang does not read'
    return "eagle3", "EAGLE-3, in the dialect that SGLang and vLLM read"


def most_steps(config: HeadConfig) -> int | None:
    """Draft steps that a head can run; None: any number."""
    return config.drafts if isinstance(config, BlockHeadConfig) else None


def proposer_of(
    head: Head, embed: Callable[[Tensor], Tensor], unembed: Callable[[Tensor], Tensor], max_positions: int
) -> HeadProposer:
    """What asks a head, for all requests of an engine.

    Args:
        embed, unembed: the target's embeddings and lm_head.
        max_positions: of the target.
    """
    if isinstance(head, BlockHead):
        return BlockProposer(head, embed, unembed, max_positions)
    return Eagle3Proposer(head, embed, max_positions)
