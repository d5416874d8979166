"""Measures every method on held-out prompts."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("evaluate")
