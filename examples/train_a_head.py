"""Train a draft head for your target, learn a policy for this device, and measure both.

    python examples/train_a_head.py org/name chats.jsonl

Hardware:    a device that holds the target, its states and a one-layer head; for several see docs/training.md.
Minutes:     SmolLM2-135M on two CPU cores: 10, installation included, with the settings of `make quickstart`. Others:
             not measured.
Acceptance:  there 2.62 tokens per pass of the target, on held-out questions like those that it was trained on.
"""

import sys

from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.target import TargetConfig
from graft_train.distill import distill
from graft_train.evaluate import evaluate
from graft_train.export import export
from graft_train.regenerate import regenerate


def main(config: Config) -> None:
    """Goes on where it was interrupted: a stage that is complete is reused."""
    regenerate(config)  # the target answers the prompts: run_dir/data
    distill(config)  # a head learns from the answers: run_dir/head
    build_corpus(config)  # what follows what: run_dir/corpus
    calibrate(config)  # when to draft, what to look up: run_dir/policy
    export(config)  # all of it in one place: run_dir/bundle
    evaluate(config)  # the table: run_dir/evaluation


if __name__ == "__main__":
    target, data = sys.argv[1:]
    main(Config(run_dir="runs/mine", target=TargetConfig(target), data=DataConfig(path=data)))
