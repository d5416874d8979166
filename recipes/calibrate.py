"""Chooses the pruning policy for this device."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("calibrate")
