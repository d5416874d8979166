"""Builds the retrieval corpus, and prints what it holds."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("build_corpus")
