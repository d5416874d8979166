"""Lets the target answer the training prompts."""

import hydra
from omegaconf import DictConfig

from graft_train.recipe import run_recipe
from graft_train.regenerate import regenerate


@hydra.main(version_base=None, config_path="../conf", config_name="regenerate")
def main(composed: DictConfig) -> None:
    run_recipe(composed, regenerate)


if __name__ == "__main__":
    main()
