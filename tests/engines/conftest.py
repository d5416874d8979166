"""The pairs of all engines' tests: each head is trained when it is first asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from .pair import write_bundle, write_target

EAGLE3 = {"ttt_steps": 4, "draft_vocab_size": 64, "aux_layer_ids": [0, 1, 3]}
BLOCK = {"family": "block", "draft_vocab_size": 64, "aux_layer_ids": [0, 1, 3]}
HEADS = {
    "eagle3": EAGLE3,
    "eagle3 of 32 tokens and two layers": EAGLE3 | {"draft_vocab_size": 32, "aux_layer_ids": [0, 3]},
    "eagle3 with norm_before_residual": EAGLE3 | {"draft_vocab_size": 32, "norm_before_residual": True},
    "eagle3 with the last layer": EAGLE3 | {"aux_layer_ids": [1, 3, 5]},
    "dflash": BLOCK | {"block": {"causal": False, "block_size": 5}},
    "causal dflash of 32 tokens": BLOCK | {"draft_vocab_size": 32, "block": {"causal": True, "block_size": 5}},
}


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """Its directory, and the model."""
    directory = tmp_path_factory.mktemp("target")
    return directory, write_target(directory)


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, target: tuple[Path, LlamaForCausalLM]) -> Callable[[str], Path]:
    """The bundle of a head in `HEADS`."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            made[name] = write_bundle(tmp_path_factory.mktemp("run"), *target, **HEADS[name])
        return made[name]

    return bundle
