"""A target that two processes compute together is calibrated and evaluated as by one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from graft_inference import METHODS, GraftError, Policy
from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.distill import distill
from graft_train.evaluate import evaluate
from graft_train.export import export
from graft_train.regenerate import regenerate
from tests.graft_inference.test_tensor_parallel import run_ranks
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources

RANK = """
import os, sys
from pathlib import Path
from graft_train.calibrate import calibrate
from graft_train.evaluate import evaluate
from tests.graft_train.tiny_run import tiny_config

config = tiny_config(Path(sys.argv[1]), Path(sys.argv[2]))
config.target.tp_plan = "auto"
calibrate(config)
evaluate(config)
sys.stdout.flush()
os._exit(0)  # gloo's threads may still hold Python objects, and an interpreter that is ending aborts on them
"""


def test_two_processes_calibrate_and_evaluate_one_target(tmp_path):
    sources, alone, together = (tmp_path / name for name in ("sources", "alone", "together"))
    write_sources(sources)
    config = tiny_config(alone, sources)
    write_target(alone / "target", vocab_size=62)  # even, as transformers shares out lm_head
    for stage in (regenerate, distill, build_corpus, calibrate, export):
        stage(config)
    shutil.copytree(alone, together)
    shutil.rmtree(together / "policy")
    said = run_ranks(together, RANK, together, sources)
    assert said.count("calibrate: finished") == said.count("evaluate: finished") == 1

    ours, theirs = (load_file(run / "policy" / "traces.safetensors") for run in (together, alone))
    for name, column in theirs.items():
        torch.testing.assert_close(ours[name], column, rtol=1e-4, atol=1e-4, msg=name)
    Policy.from_dict(json.loads((together / "policy" / "policy.json").read_text()))
    measured = json.loads((together / "policy" / "report.json").read_text())["measured"]
    assert all(found["tokens_per_second"] > 0 for found in measured.values())
    evaluation = json.loads((together / "evaluation" / "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert all(found["same_tokens_as_autoregressive"] == 1 for found in evaluation["methods"].values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "needs several processes: start them with torchrun"), ({"device_map": "auto"}, "exclude each other")],
)
def test_a_launch_that_cannot_be_is_refused(tmp_path, changes, words):
    from tests.graft_train import test_evaluate

    config = test_evaluate.config_for(test_evaluate.write_run(tmp_path / "run"))
    config.target.tp_plan = "auto"
    for name, value in changes.items():
        setattr(config.target, name, value)
    with pytest.raises(GraftError, match=words):
        evaluate(config)
