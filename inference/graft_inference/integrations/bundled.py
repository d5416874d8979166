"""What other engines need of a bundle: its policy, and sources that propose but do not learn."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..bundle import load_policy, resolve
from ..errors import GraftError
from ..heads.families import load_any_config
from ..policy.policy import Policy
from ..proposer import Opening, TokenSource
from ..retrieval.sources import SOURCES


def policy_of(bundle: str, target_config: Any, tokenizer: Any | None) -> tuple[Policy, dict[str, Any]]:
    """A bundle's policy, and its tables for sources, by name. The engine itself loads the head.

    Args:
        bundle: directory or Hub id.
        target_config: the target's (text) configuration.
        tokenizer: the target's, or None to skip that check.

    Raises:
        GraftError: no bundle, or another target or tokenizer.
    """
    directory = resolve(bundle)
    if not (directory / "graft.json").exists():
        raise GraftError(f"{bundle} has no graft.json: it is a head without a policy, which needs no Graft")
    shape = load_any_config(directory, target_config.num_hidden_layers)
    policy, successors = load_policy(directory, shape, target_config, tokenizer)
    return policy, {"matrix": successors}


def frozen_sources(names: Iterable[str], tables: Mapping[str, Any], text_S: Tensor) -> dict[str, TokenSource]:
    """Sources opened anew on a whole text, since nothing is kept from round to round.

    Args:
        tables: a bundle's tables for sources, by name.
        text_S: prompt and output so far, the root last, int64 on the CPU.
    """
    opening = Opening(text_S, len(text_S), dict(tables), scope="frozen")
    return {name: SOURCES[name].open(opening) for name in names}
