"""Exports the bundle, and pushes it to the Hub if asked."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("export")
