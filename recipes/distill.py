"""Distils the EAGLE-3 draft head."""

import hydra
from omegaconf import DictConfig

from graft_train.distill import distill
from graft_train.recipe import run_recipe


@hydra.main(version_base=None, config_path="../conf", config_name="distill")
def main(composed: DictConfig) -> None:
    run_recipe(composed, distill)


if __name__ == "__main__":
    main()
