"""Takes a published head in place of distilling one."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("adopt")
