#!/usr/bin/env bash
# Where datasets 5.1.0 types a field of a JSON file as Json, a string that reads as JSON is taken for JSON:
# the answer "4" comes back as the number 4, "007" as 7, "null" as None and "[1, 2]" as a list. One row of another
# type, anywhere in the file, does that to all the others, which are strings in the file and valid as they stand.
# Seen with datasets 5.1.0, pandas 3.1.1 and pyarrow 26.0.1. Why it matters: one message with a list of parts among
# plain chats is enough; short answers then render as other text, or as "None", in the chats that a head learns from.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.1.0 pandas==3.1.1 pyarrow==26.0.1
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json

import datasets

datasets.disable_progress_bars()
answers = ["4", "007", "1.50", "true", "null", "[1, 2]", '{"city": "Oslo"}', "four"]
parts = [{"type": "text", "text": "a message of parts"}]


def read(name, contents):
    with open(name, "w") as file:
        for content in contents:
            file.write(json.dumps({"messages": [{"role": "assistant", "content": content}]}) + "\n")
    rows = datasets.load_dataset("json", data_files=name, split="train")
    return [row["messages"][0]["content"] for row in rows]


alone = read("alone.jsonl", answers)
beside = read("beside.jsonl", [*answers, parts])
print("datasets", datasets.__version__)
for written, got in zip(answers, beside):
    print(f"written {written!r}, read {got!r}")

assert alone == answers
assert beside[:-1] == [4, 7, 1.5, True, None, [1, 2], {"city": "Oslo"}, "four"]
assert beside[-1] == parts
PY
