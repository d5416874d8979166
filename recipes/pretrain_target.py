"""Trains the small target of the quickstart."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("pretrain_target")
