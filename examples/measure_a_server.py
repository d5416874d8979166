"""Time an OpenAI-compatible server on GSM8K, whether it speculates or not; several are compared with the last.

    python examples/measure_a_server.py Qwen/Qwen3-8B http://localhost:8000/v1 http://localhost:8001/v1

Hardware:    the server's. This process needs the target's tokenizer alone.
Minutes:     not measured; every prompt is asked once for each number of requests at a time.
Acceptance:  read from the server's /metrics, where they tell it: vLLM's do, and graft serve's.
"""

import sys
from pathlib import Path

from graft_train.config import Config
from graft_train.config.evaluation import EvaluateConfig
from graft_train.config.target import TargetConfig
from graft_train.evaluate import evaluate


def main(config: Config) -> Path:
    """Returns the directory with evaluation.json and report.md; the table is printed."""
    return evaluate(config)


if __name__ == "__main__":
    target, *servers = sys.argv[1:]
    asked = EvaluateConfig(server=servers, suite="gsm8k", prompts=80, concurrency=[1, 8])
    main(Config(run_dir="runs/servers", target=TargetConfig(target), evaluation=asked))
