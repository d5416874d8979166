"""The whole road in a row: from the standard library's sources to a measured table."""

import hydra
from omegaconf import DictConfig

from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.distill import distill
from graft_train.evaluate import evaluate
from graft_train.export import export
from graft_train.pretrain_target import pretrain_target
from graft_train.recipe import run_recipe
from graft_train.regenerate import regenerate


@hydra.main(version_base=None, config_path="../conf", config_name="quickstart")
def main(composed: DictConfig) -> None:
    run_recipe(composed, pretrain_target, regenerate, distill, build_corpus, calibrate, export, evaluate)


if __name__ == "__main__":
    main()
