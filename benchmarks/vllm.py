"""Graft inside vLLM against vLLM's own drafters, at one budget of draft tokens, on held-out prompts of several suites.

    make engines
    python benchmarks/vllm.py --bundle runs/smollm2/bundle --target runs/smollm2/target \
        --suites gsm8k=gsm8k.jsonl humaneval=humaneval.jsonl --run runs/smollm2

The bundle's policy must be one of chains (`policy.kind=chain policy.topk=1`). `--run` adds the run's own held-out
prompts. Every method decodes the prompts of all suites, in turns, in a vLLM of its own, so many at a time; output is
compared with plain decoding's. The figures of a suite are its acceptance length: tokens for a pass of the target, those
after the first of each answer. Arctic's suffix decoding takes part where its package is in vLLM's environment.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

import graft_inference
from graft_inference.bundle import load_graft
from graft_inference.policy.plan import ChainPlan
from graft_train.config.data import DataConfig
from graft_train.data.samples import read_samples
from graft_train.data.suites import read_questions

DRIVER = Path(__file__).parents[1] / "tests" / "engines" / "vllm_driver.py"
WORKER = "graft_inference.integrations.vllm.GraftWorker"
RETRIEVER = "graft_inference.integrations.vllm.GraftRetriever"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--suites", nargs="*", default=[], help="name=file")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--prompts", type=int, default=12, help="of each suite")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--python", type=Path, default=Path(".engines/vllm/bin/python"))
    arguments = parser.parse_args()
    suites, length = suites_of(arguments), length_of(arguments.bundle)
    names, prompts = zip(*in_turns(suites), strict=True)
    columns = "method", *suites, "drafted a pass", "of these accepted", "tokens/s", "same text"
    print(f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    plain = None
    for method, job in jobs_of(arguments, length).items():
        found = run(arguments, prompts, job)
        plain = plain or found["tokens"]
        print(row_of(method, names, found, found["tokens"] == plain), flush=True)


def length_of(bundle: Path) -> int:
    plan = load_graft(bundle / "graft.json")[0].graft
    assert isinstance(plan, ChainPlan), f"{bundle} makes trees: calibrate with policy.kind=chain policy.topk=1"
    return plan.length


def suites_of(arguments: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of every suite's prompts."""
    tokenizer, suites = AutoTokenizer.from_pretrained(arguments.target), {}
    for name, path in (suite.split("=") for suite in arguments.suites):
        questions = read_questions(name, DataConfig(path=path), seed=0)[: arguments.prompts]
        chats = [[{"role": "user", "content": question.turns[0]}] for question in questions]
        suites[name] = [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
            for chat in chats
        ]
    if arguments.run:
        held_out = read_samples(arguments.run / "data" / "samples.jsonl", "evaluation")[: arguments.prompts]
        suites["held out"] = [list(sample.prompt_ids) for sample in held_out]
    return suites


def in_turns(suites: dict[str, list[list[int]]]) -> list[tuple[str, list[int]]]:
    """Suite and prompt, one of each suite after the other."""
    rounds = zip_longest(*suites.values())
    return [(name, prompt) for turn in rounds for name, prompt in zip(suites, turn, strict=True) if prompt]


def jobs_of(arguments: argparse.Namespace, length: int) -> dict[str, dict[str, Any]]:
    """What tells the methods apart, plain decoding first."""
    bundle = str(arguments.bundle.resolve())
    budget = {"num_speculative_tokens": length}
    head = {"method": "eagle3", "model": bundle, **budget}
    lookup = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5, **budget}
    jobs: dict[str, dict[str, Any]] = {
        "plain": {"speculative_config": None},
        "ngram": {"speculative_config": lookup},
        "suffix": {"speculative_config": {"method": "suffix", **budget}},
        "eagle3": {"speculative_config": head},
        "graft, sources alone": {
            "speculative_config": {"method": "custom_class", "model": RETRIEVER, **budget},
            "settings": {"additional_config": {"graft_bundle": bundle}},
        },
        "graft": {"speculative_config": {**head, "disable_padded_drafter_batch": True}, "worker_cls": WORKER},
    }
    found = subprocess.run([arguments.python, "-c", "import arctic_inference"], capture_output=True, check=False)
    if found.returncode:
        del jobs["suffix"]
    return jobs


def run(arguments: argparse.Namespace, prompts: Sequence[list[int]], job: dict[str, Any]) -> dict[str, Any]:
    """What the driver finds; the runtime lies on the path of vLLM's Python."""
    settings = {"max_num_seqs": arguments.at_once, "max_model_len": 1024} | job.get("settings", {})
    ends = GenerationConfig.from_pretrained(arguments.target).eos_token_id
    common = {
        "target": str(arguments.target.resolve()),
        "prompts": prompts,
        "max_tokens": arguments.tokens,
        "warm_up": True,
        "stop_token_ids": ends if isinstance(ends, list) else [ends],
    }
    runtime = str(Path(graft_inference.__file__).parents[1])
    with tempfile.TemporaryDirectory() as directory:
        paths = Path(directory) / "job.json", Path(directory) / "result.json"
        paths[0].write_text(json.dumps(common | job | {"settings": settings}))
        command = [arguments.python.absolute(), DRIVER, *paths]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": runtime})
        return json.loads(paths[1].read_text())


def row_of(method: str, names: Sequence[str], found: dict[str, Any], is_same: bool) -> str:
    later, passes = Counter[str](), Counter[str]()
    for name, tokens, took in zip(names, found["tokens"], found["passes"], strict=True):
        later[name] += len(tokens) - 1  # the first token of an answer comes from reading its prompt
        passes[name] += took - 1
    drafted = found["draft_tokens"]
    cells = [f"{later[name] / passes[name]:.2f}" for name in passes]
    cells += [
        f"{drafted / passes.total():.2f}",
        f"{found['accepted'] / drafted:.0%}" if drafted else "",
        f"{sum(map(len, found['tokens'])) / found['seconds']:.1f}",
        "yes" if is_same else "**no**",
    ]
    return f"| {method} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
