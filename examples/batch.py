"""Decode several prompts together. Each gets the tokens that it would get alone.

    python examples/batch.py runs/quickstart/bundle runs/quickstart/target "def read(" "class Reader:" "import os"

Hardware:    whatever holds the target and a cache for each prompt.
Minutes:     under one on a CPU, for a target of 135 million parameters.
Acceptance:  as alone. 8 prompts together took 2.66x the tokens/s of one after the other, on the toy pair and one thread
             of a Xeon (docs/benchmarks/batch.md).
"""

import sys
from collections.abc import Sequence

from graft_inference import Generation, GraftEngine


def main(bundle: str, target: str, prompts: Sequence[str], max_new_tokens: int = 64) -> Generation:
    engine = GraftEngine.from_pretrained(bundle, target)
    ids = [engine.tokenizer(prompt).input_ids for prompt in prompts]
    out = engine.generate(ids, max_new_tokens=max_new_tokens)
    begin = max(map(len, ids))  # new tokens stand from one column on
    for prompt, tokens, stats in zip(prompts, out.sequences, out.each, strict=True):
        text = engine.tokenizer.decode(tokens[begin : begin + stats.emitted], skip_special_tokens=True)
        print(f"--- {prompt!r}: {stats.acceptance_length:.2f} tokens per pass\n{text}")
    return out


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
