"""A table of latencies measured in vLLM is one that the policy can be chosen by."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import graft_inference

from .environments import python_of
from .pair import write_bundle, write_target
from .vllm_driver import ENVIRONMENT

pytestmark = pytest.mark.engines("vllm")


def test_a_table_is_measured_for_several_requests_at_a_time(tmp_path):
    model = write_target(tmp_path / "target")
    bundle = write_bundle(tmp_path / "run", tmp_path / "target", model, aux_layer_ids=[1, 2, 4], draft_vocab_size=64)
    sizes = {"head": bundle, "target": tmp_path / "target", "length": 5, "steps": 3, "at-once": 4, "context": 24}
    settings = {"dtype": "float32", "enforce_eager": True}
    command = [python_of("vllm"), "-m", "graft_inference.integrations.vllm_latency"]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command += ["--out", str(tmp_path / "latency.json"), "--settings", json.dumps(settings)]
    runtime = {"PYTHONPATH": str(Path(graft_inference.__file__).parents[1])}
    subprocess.run(command, check=True, env=os.environ | ENVIRONMENT | runtime, cwd=tmp_path)
    table = json.loads((tmp_path / "latency.json").read_text())
    assert table["num_draft_tokens"] == [1, 2, 3, 4, 5, 6]
    assert table["contexts"] == [24]
    (verify_ms,), draft_ms = table["verify_ms"], table["draft_ms"]
    assert (len(verify_ms), len(draft_ms)) == (6, 4)
    assert verify_ms == sorted(verify_ms)
    assert verify_ms[0] > 0 == draft_ms[0]
    assert draft_ms == sorted(draft_ms)
    assert table["measured_on"]["engine"].endswith(", 4 requests at a time")
