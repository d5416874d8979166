"""Chooses the pruning policy for this device."""

import hydra
from omegaconf import DictConfig

from graft_train.calibrate import calibrate
from graft_train.recipe import run_recipe


@hydra.main(version_base=None, config_path="../conf", config_name="calibrate")
def main(composed: DictConfig) -> None:
    run_recipe(composed, calibrate)


if __name__ == "__main__":
    main()
