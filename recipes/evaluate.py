"""Measures every method on held-out prompts."""

import hydra
from omegaconf import DictConfig

from graft_train.evaluate import evaluate
from graft_train.recipe import prepare


@hydra.main(version_base=None, config_path="../conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    evaluate(prepare(composed))


if __name__ == "__main__":
    main()
