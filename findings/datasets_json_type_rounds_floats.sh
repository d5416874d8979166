#!/usr/bin/env bash
# datasets 5.1.0 gives a field of mixed types in a JSON file its type Json. It stores such values as text with
# ten decimals, so a float of the file comes back rounded, and 1.5e-11 comes back as zero.
# A field of one type only keeps every digit. Nothing warns.
# Seen with datasets 5.1.0, pandas 3.1.1 and pyarrow 26.0.1. Why it matters: arguments of tool calls are the
# fields that mix types, and a draft head is then trained on numbers that its data never held.
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


def read(name, values):
    with open(name, "w") as file:
        file.writelines(json.dumps({"arguments": {"value": value}}) + "\n" for value in values)
    rows = datasets.load_dataset("json", data_files=name, split="train")
    return rows.features["arguments"]["value"], [row["arguments"]["value"] for row in rows]


floats = [3.141592653589793, 1234.567890123457, 1.5e-11, 0.5]
plain_type, plain = read("plain.jsonl", floats)
mixed_type, mixed = read("mixed.jsonl", [*floats, "north"])
print("datasets", datasets.__version__)
print("floats alone:        ", plain_type, plain)
print("floats beside a word:", mixed_type, mixed)

assert plain == floats
assert isinstance(mixed_type, datasets.Json)
assert mixed == [3.1415926536, 1234.5678901235, 0.0, 0.5, "north"]
PY
