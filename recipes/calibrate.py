"""Learns the policy for this device: when drafting stops, and what is verified."""

from graft_train.recipe import run

if __name__ == "__main__":
    run("calibrate")
