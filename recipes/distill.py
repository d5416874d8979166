"""Distils the draft head."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("distill")
