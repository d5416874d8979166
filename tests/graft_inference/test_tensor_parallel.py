"""A target that two processes compute together gives what one alone gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

from graft_inference import METHODS, GraftEngine
from graft_inference.bundle import load_bundle
from graft_inference.heads.eagle3.checkpoint import save_head

from .test_engine import prompt
from .tiny import tiny_head, tiny_model

ROOT = Path(__file__).parents[2]

RANK = """
import json, os, sys
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from graft_inference import METHODS, GraftEngine, GraftError
from graft_inference.bundle import load_bundle

distributed.init_process_group("gloo")
bundle, target, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(target, tp_plan="auto", dtype=torch.float32).eval()
engine = GraftEngine.from_bundle(load_bundle(bundle, model.config, None), model)
assert engine.target.is_split
ids = torch.tensor(json.loads(ids))
found = [engine.generate(ids, 16, method=method).sequences.tolist() for method in METHODS]
found.append(engine.generate(ids, 16, temperature=1.0, seed=3).sequences.tolist())
found.append(engine.generate([ids, ids[:, :4]], 16, pad_token_id=0).sequences.tolist())
try:
    engine.generate(ids, 16, temperature=1.0)
except GraftError as error:
    found.append(str(error))
if distributed.get_rank() == 0:
    open(out, "w").write(json.dumps(found))
distributed.barrier()
os._exit(0)  # gloo's threads may still hold Python objects, and an interpreter that is ending aborts on them
"""


def run_ranks(directory: Path, script: str, *arguments: object) -> str:
    """What a script says in two processes of one group; both must succeed."""
    path = directory / "rank.py"
    path.write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*launcher, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'inference'}"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def test_two_processes_serve_one_target(tmp_path):
    model = tiny_model("llama", vocab_size=64)  # transformers splits lm_head evenly
    target, bundle = tmp_path / "target", tmp_path / "bundle"
    model.save_pretrained(target)
    save_head(tiny_head(model), bundle)
    out = tmp_path / "out.json"
    run_ranks(tmp_path, RANK, bundle, target, json.dumps(prompt(9).tolist()), out)
    *sequences, refusal = json.loads(out.read_text())
    engine = GraftEngine.from_bundle(load_bundle(bundle, model.config, None), model)
    expected = [engine.generate(prompt(9), 16, method=method).sequences.tolist() for method in METHODS]
    expected.append(engine.generate(prompt(9), 16, temperature=1.0, seed=3).sequences.tolist())
    expected.append(engine.generate([prompt(9), prompt(9)[:, :4]], 16, pad_token_id=0).sequences.tolist())
    assert sequences == expected
    assert "pass seed=" in refusal
