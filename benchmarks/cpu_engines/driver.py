"""One engine behind a pipe: `python driver.py ENGINE SETTINGS`, by the Python of the engine's own environment.

SETTINGS is JSON: `target` (a directory, or a GGUF file for llama.cpp), `dtype`, `threads`, `ends` (ids that end an
answer), `bundle` and `method` of ours, `head` and `drafts` of llama.cpp. Each line of stdin is [prompt ids, most new
tokens]; each line of stdout the new ids. Everything is greedy.
"""

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

Answer = Callable[[list[int], int], list[int]]


def ours(settings: dict[str, Any]) -> Answer:
    import torch

    from graft_inference import GraftEngine

    torch.set_num_threads(settings["threads"])
    engine = GraftEngine.from_pretrained(settings["bundle"], settings["target"], "cpu", settings["dtype"])

    def answer(prompt: list[int], tokens: int) -> list[int]:
        found = engine.generate(torch.tensor(prompt), tokens, method=settings["method"])
        return found.sequences[0, len(prompt) :].tolist()

    return answer


def transformers(settings: dict[str, Any]) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["target"], dtype=settings["dtype"]).eval()
    model.generation_config = GenerationConfig(eos_token_id=settings["ends"])

    def answer(prompt: list[int], tokens: int) -> list[int]:
        with torch.inference_mode():
            found = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
        return found[0, len(prompt) :].tolist()

    return answer


def llama_cpp(settings: dict[str, Any]) -> Answer:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["target"]
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    if settings.get("head"):
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        draft = params.speculative.draft
        draft.mparams.path = settings["head"]
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = settings["threads"]
        draft.n_max = settings["drafts"]
    server = xllamacpp.Server(params)

    def answer(prompt: list[int], tokens: int) -> list[int]:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0}
        body = json.dumps(asked | {"return_tokens": True, "cache_prompt": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/completion", body, HEADERS)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]

    return answer


def vllm(settings: dict[str, Any]) -> Answer:
    os.environ |= {
        "OMP_NUM_THREADS": str(settings["threads"]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        settings["target"], dtype=settings["dtype"], max_model_len=2048, max_num_seqs=1, skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )  # fmt: skip

    def answer(prompt: list[int], tokens: int) -> list[int]:
        asked = SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=settings["ends"], detokenize=False)
        (found,) = engine.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)
        return list(found.outputs[0].token_ids)

    return answer


def openvino(settings: dict[str, Any]) -> Answer:
    import numpy as np
    import openvino
    import openvino_genai

    hints = {"INFERENCE_NUM_THREADS": settings["threads"], "INFERENCE_PRECISION_HINT": PRECISIONS[settings["dtype"]]}
    pipeline = openvino_genai.LLMPipeline(settings["target"], "CPU", **hints)

    def answer(prompt: list[int], tokens: int) -> list[int]:
        asked = openvino_genai.GenerationConfig(max_new_tokens=tokens, do_sample=False)
        asked.stop_token_ids = set(settings["ends"])
        found = pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), asked)
        return list(found.tokens[0])

    return answer


HEADERS = {"Content-Type": "application/json"}
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
ENGINES = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp, "vllm": vllm, "openvino": openvino}


def main(engine: str, settings: str) -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answer = ENGINES[engine](json.loads(settings))
    print("ready", file=pipe, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), file=pipe, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
