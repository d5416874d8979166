"""The whole road in a row: from the standard library's sources to a measured table."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("quickstart")
