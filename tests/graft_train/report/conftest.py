"""The pair of the replay's tests, and its traces."""

from ..calibrate.test_calibrate import chain_traces, engine, prompts, traces  # noqa: F401
