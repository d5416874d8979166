"""Runs one job in vLLM, by the Python of its own environment: `python vllm_driver.py JOB.json RESULT.json`.

The job:
    target              directory of the target; a tokenizer is not needed
    prompts             token ids of each prompt
    max_tokens          new tokens of each
    stop_token_ids      which end a text sooner; may be absent
    speculative_config  as vLLM has it; null for plain decoding
    worker_cls          qualified name of a worker class in place of vLLM's own; may be absent
    settings            more arguments of `vllm.LLM`; may be absent
    environment         variables that differ from those below; may be absent
    warm_up             true: answers a few tokens first, whose last round vLLM counts late; may be absent

The result:
    tokens                 new token ids of each prompt
    passes                 of the target that gave them, the first of which read the prompt
    drafts                 verifications of drafted tokens, over all prompts
    draft_tokens           tokens that were drafted for them
    accepted               of these, how many the target accepted, those behind max_tokens included
    accepted_per_position  the same by place in the draft
    seconds                from the first request to the last token
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before vLLM is imported, which reads them.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    os.environ.update(ENVIRONMENT | job.get("environment", {}))
    Path(result_path).write_text(json.dumps(run(job)))


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    settings = DEFAULTS | job.get("settings", {})
    if job.get("worker_cls"):
        settings["worker_cls"] = job["worker_cls"]
    llm = LLM(model=job["target"], speculative_config=job["speculative_config"], **settings)
    ends = {"stop_token_ids": job.get("stop_token_ids"), "ignore_eos": True}
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], detokenize=False, **ends)
    if job.get("warm_up"):  # kernels and what is compiled when first used take no part in the seconds
        answered(
            llm, job["prompts"][:1], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
        )
    before = counted(llm)
    start = time.perf_counter()
    found = answered(llm, job["prompts"], sampling)
    seconds = time.perf_counter() - start
    after = counted(llm)
    per_position = [late - early for early, late in zip(before.pop(PER_POSITION), after.pop(PER_POSITION), strict=True)]
    return {
        **found,
        "seconds": seconds,
        **{name: after[name] - before[name] for name in COUNTERS},
        "accepted_per_position": per_position,
    }


def answered(llm: Any, prompts: list[list[int]], sampling: Any) -> dict[str, Any]:
    """New tokens of each prompt, and in how many passes they came."""
    engine, tokens, passes = llm.llm_engine, [[] for _ in prompts], [0 for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            number, found = int(output.request_id), list(output.outputs[0].token_ids)
            passes[number] += len(found) > len(tokens[number])
            tokens[number] = found
    return {"tokens": tokens, "passes": passes}


def counted(llm: Any) -> dict[str, Any]:
    """What vLLM has counted so far."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    counts: dict[str, Any] = {name: found[metric].value if metric in found else 0 for name, metric in COUNTERS.items()}
    return counts | {PER_POSITION: found[PER_POSITION].values if PER_POSITION in found else []}


if __name__ == "__main__":
    main(*sys.argv[1:])
