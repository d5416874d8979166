#!/usr/bin/env bash
# SGLang has a registry for speculative algorithms of plug-ins, and a stock class for them. When one is registered, it
# checks that every method of its own algorithms is there, but only those named is_... and supports_... Its scheduler
# asks every algorithm for three others, too, which the stock class lacks: create_future_map and
# carries_draft_hidden_states in managers/scheduler.py, need_topk in managers/overlap_utils.py.
# Seen with sglang 0.5.23 (its Python, without a GPU), torch 2.13.0 and transformers 5.19.0. Why it matters: a plug-in
# as the documentation of `SpeculativeAlgorithm.register` shows one is taken, and the server fails once the model is
# loaded. A class of one's own (`spec_class=`) that adds the three is the way round.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 triton==3.9.0 aiohttp apache-tvm-ffi dill \
    einops fastapi gguf ipython msgspec openai orjson pillow psutil pybase64 pyzmq requests sentencepiece uvicorn
# Its Python alone: the rest of what it asks for is CUDA.
"$work/venv/bin/pip" install --quiet --no-deps sglang==0.5.23
cd "$work"
HOME="$work" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$work/venv/bin/python" 2> errors.txt - <<'PY' || { cat errors.txt; exit 1; }
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import sglang
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

SpeculativeAlgorithm.register("MINE")(lambda server_args: object)
mine = SpeculativeAlgorithm.from_string("MINE")
print("sglang", version("sglang"), "registered", mine)

called = set()
for name in ("scheduler", "overlap_utils"):
    source = (Path(sglang.__file__).parent / "srt" / "managers" / f"{name}.py").read_text()
    called |= set(re.findall(r"\bself\.spec_algo(?:rithm)?\.([a-z_]+)\(", source))
lacking = sorted(name for name in called if not hasattr(mine, name))
print("asked by the scheduler and its relay, and lacking:", lacking)
assert all(hasattr(SpeculativeAlgorithm.EAGLE3, name) for name in called)

pool = SimpleNamespace(req_to_token=torch.zeros(4, 8, dtype=torch.int32))


def told(call):
    try:
        return f"a {type(call()).__name__}"
    except AttributeError as error:
        return str(error)


def scheduled(algorithm):
    """As `Scheduler.init_overlap` calls it."""
    return algorithm.create_future_map(torch.device("cpu"), pool, needs_cpu_seq_lens=True, needs_confidence_relay=False)


found = {name: told(lambda: scheduled(one)) for name, one in {"EAGLE3": SpeculativeAlgorithm.EAGLE3, "MINE": mine}.items()}
print("what the scheduler makes of them:", found)
assert lacking == ["carries_draft_hidden_states", "create_future_map", "need_topk"]
assert found == {"EAGLE3": "a FutureMap", "MINE": "'CustomSpecAlgo' object has no attribute 'create_future_map'"}
PY
