"""Trains the small target of the quickstart."""

import hydra
from omegaconf import DictConfig

from graft_train.pretrain_target import pretrain_target
from graft_train.recipe import run_recipe


@hydra.main(version_base=None, config_path="../conf", config_name="pretrain_target")
def main(composed: DictConfig) -> None:
    run_recipe(composed, pretrain_target)


if __name__ == "__main__":
    main()
