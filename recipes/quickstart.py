"""The whole road in a row: from a language model to a measured table and an answer in colours."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("quickstart")
