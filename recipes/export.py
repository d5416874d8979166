"""Exports the bundle, and pushes it to the Hub if asked."""

import hydra
from omegaconf import DictConfig

from graft_train.export import export
from graft_train.recipe import run_recipe


@hydra.main(version_base=None, config_path="../conf", config_name="export")
def main(composed: DictConfig) -> None:
    run_recipe(composed, export)


if __name__ == "__main__":
    main()
