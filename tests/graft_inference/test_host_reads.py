"""How often a round waits for the device: once at its end, and once for each decision on the way."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graft_inference import METHODS

from .tiny import learned_policy, tiny_engine, tiny_model, tiny_policy

READS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "equal", "masked_select"}
"""Operators whose result, or its size, the host has to know; int() and bool() are the first two."""


class HostReads(TorchDispatchMode):
    """Counts them; `tolist` reads without an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += name in READS or by_mask
        return func(*args, **(kwargs or {}))

    def tolist(self, tensor):
        self.count += 1
        return TOLIST(tensor)


TOLIST = Tensor.tolist


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_kind_of_read_is_counted(mode):
    values = torch.arange(3)
    with (
        mode(),
        HostReads() as reads,
        mock.patch.object(Tensor, "tolist", lambda tensor: reads.tolist(tensor)),
    ):
        values[0].item(), int(values[1]), bool(values[0] > 1), values.tolist(), values[values > 0], float(values[0])
        assert reads.count == 6
        assert (values + 1)[1:].sum().shape == values[torch.tensor([1])].sum().shape
        assert reads.count == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy])
def test_a_round_reads_once_and_at_each_checkpoint(policy, method, temperature):
    engine = tiny_engine(tiny_model("llama"), policy())
    plan = engine.policy.plan(method)
    decided = {}
    for place, stage in enumerate(plan.stages):
        # Every earlier checkpoint, and this one unless it is the last; then the width where there is a choice.
        decided[stage.name] = place + (stage is not plan.stages[-1]) + (len(stage.widths) > 1)
    rounds, run = [], engine._round

    def counted(state):
        before, stages = reads.count, state.stats.stages.copy()
        emitted = run(state)
        (stage,) = (state.stats.stages - stages).elements()
        rounds.append((reads.count - before, stage))
        return emitted

    engine._round = counted
    with HostReads() as reads, mock.patch.object(Tensor, "tolist", lambda tensor: reads.tolist(tensor)):
        engine.generate(torch.arange(9), 40, temperature, method, seed=1)
    assert len(rounds) > 5
    for count, stage in rounds:
        assert count == 1 + decided[stage]
