"""Builds the retrieval corpora, and prints what they hold."""

import hydra
from omegaconf import DictConfig

from graft_train.build_corpus import build_corpus
from graft_train.recipe import run_recipe


@hydra.main(version_base=None, config_path="../conf", config_name="build_corpus")
def main(composed: DictConfig) -> None:
    run_recipe(composed, build_corpus)


if __name__ == "__main__":
    main()
