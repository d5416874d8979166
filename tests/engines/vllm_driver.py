"""Runs one job in vLLM, by the Python of its own environment: `python vllm_driver.py JOB.json RESULT.json`.

The job:
    target              directory of the target; a tokenizer is not needed
    prompts             token ids of each prompt
    batches             in their place: prompts by the name of their batch, which are answered one batch after the other
    max_tokens          new tokens of each
    stop_token_ids      which end a text sooner; may be absent
    speculative_config  as vLLM has it; null for plain decoding
    worker_cls          qualified name of a worker class in place of vLLM's own; may be absent
    settings            more arguments of `vllm.LLM`; may be absent
    environment         variables that differ from those below; may be absent
    warm_up             true: answers a few tokens first, whose last round vLLM counts late; may be absent

The result, of the prompts or by name of each batch:
    tokens                 new token ids of each prompt
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
    batches = job["batches"] if "batches" in job else {"prompts": job["prompts"]}
    if job.get("warm_up"):  # kernels and what is compiled when first used take no part in the seconds
        short = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
        answered(llm, next(iter(batches.values()))[:1], short)
    found = {name: answered(llm, prompts, sampling) for name, prompts in batches.items()}
    return found if "batches" in job else found["prompts"]


def answered(llm: Any, prompts: list[list[int]], sampling: Any) -> dict[str, Any]:
    before = counted(llm)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = counted(llm)
    per_position = [late - early for early, late in zip(before.pop(PER_POSITION), after.pop(PER_POSITION), strict=True)]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": seconds,
        **{name: after[name] - before[name] for name in COUNTERS},
        "accepted_per_position": per_position,
    }


def counted(llm: Any) -> dict[str, Any]:
    """What vLLM has counted so far."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    counts: dict[str, Any] = {name: found[metric].value if metric in found else 0 for name, metric in COUNTERS.items()}
    return counts | {PER_POSITION: found[PER_POSITION].values if PER_POSITION in found else []}


if __name__ == "__main__":
    main(*sys.argv[1:])
