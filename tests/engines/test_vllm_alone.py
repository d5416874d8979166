"""vLLM started from an exported head alone: the head names its target, and speaks both dialects."""

import json

import pytest

from .environments import run_vllm
from .pair import NEW_TOKENS, SERVED, chain, greedy

pytestmark = pytest.mark.engines("vllm")


@pytest.mark.parametrize(("name", "length"), [("eagle3 of 32 tokens and two layers", 3), ("dflash", 4)])
def test_the_heads_directory_is_all_that_vllm_needs(tmp_path, target, bundle_of, name, length):
    """It drafts as many tokens as the head says, and writes the target's text in as many rounds as our chain."""
    directory, model = target
    bundle = bundle_of(name)
    assert json.loads((bundle / "config.json").read_text())["model_type"] in ("llama", "qwen3")
    tokens, rounds = chain(bundle, directory, length)
    found = run_vllm(
        tmp_path, target=str(bundle), prompts=SERVED.tolist(), max_tokens=NEW_TOKENS, speculative_config=None
    )
    accepted = [count for prompt in rounds for count in prompt]
    print(f"{name}: {len(accepted)} rounds, {sum(accepted)} accepted; vLLM {found | {'tokens': ...}}")
    assert found["tokens"] == tokens == greedy(model, SERVED)
    assert (found["drafts"], found["draft_tokens"]) == (len(accepted), length * len(accepted))
    assert found["accepted_per_position"] == [sum(count > place for count in accepted) for place in range(length)]
    assert sum(accepted) > 0.3 * len(accepted)
