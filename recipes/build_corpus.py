"""Builds the retrieval corpora, and prints what they hold."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("build_corpus")
