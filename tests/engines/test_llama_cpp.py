"""Exported EAGLE-3 heads in llama.cpp: its text is transformers', and it accepts just what our engine accepts."""

import pytest

from .environments import HERE, run_driver
from .pair import NEW_TOKENS, SERVED, chain, greedy

pytestmark = pytest.mark.engines("llama_cpp")


@pytest.mark.parametrize("name", ["eagle3", "eagle3 with norm_before_residual"])
def test_llama_cpp_writes_the_targets_text_in_as_many_rounds_as_our_chain(tmp_path, target, bundle_of, name):
    directory, model = target
    tokens, rounds = chain(bundle_of(name), directory, 4)
    job = {"target": str(directory), "head": str(bundle_of(name)), "prompts": SERVED.tolist()}
    job |= {"max_tokens": NEW_TOKENS, "drafts": 4}
    found = run_driver("llama_cpp", HERE / "llama_cpp_driver.py", tmp_path, job)
    assert found["tokens"] == tokens == greedy(model, SERVED)
    drafted = accepted = 0
    for prompt in rounds:
        left = NEW_TOKENS - 1
        for count in prompt:
            # It drafts nothing that could not be kept beside the target's own token.
            drafted += min(4, left - 1)
            accepted += min(count, left - 1)
            left -= min(count, left - 1) + 1
    print(f"{name}: {drafted} drafted, {accepted} accepted; llama.cpp {found | {'tokens': ...}}")
    assert found["draft_tokens"] == drafted
    assert found["accepted"] == accepted
    assert accepted > 0.2 * drafted
