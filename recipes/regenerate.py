"""Lets the target answer the training prompts."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("regenerate")
