"""Distils the EAGLE-3 draft head."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("distill")
