"""Measures every method on held-out prompts."""

import hydra
from omegaconf import DictConfig

from graft_train.evaluate import evaluate
from graft_train.recipe import run_recipe


@hydra.main(version_base=None, config_path="../conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    run_recipe(composed, evaluate)


if __name__ == "__main__":
    main()
